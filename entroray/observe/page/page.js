// The page: what happened in words, and the other sections below it.

const VERDICT = {
  healthy: ["good", "It goes well: healthy"], saturated: ["fair", "It has little left to learn: saturated"], "too early": ["fair", "Too early for a verdict"],
  collapsing: ["bad", "Its entropy is collapsing"], exploding: ["bad", "Its entropy is exploding"], "no signal": ["bad", "Nothing to learn from: no signal"],
  "no gain": ["bad", "It does not improve: no gain"], declining: ["bad", "It gets worse: declining"],
};

// What was trained on what with which objective, and how it ended.
function whatHappened(run) {
  const at = Object.fromEntries(run.settings.map(([name, value]) => [name, JSON.parse(value)]));
  const steps = run.metrics.last;
  if (!run.settings.length) return run.starting ? "" : steps ? `A run of ${steps} steps whose settings are unknown.` : "";
  const parts = [...new Set(Object.keys(at).filter((n) => n.startsWith("data.parts.")).map((n) => n.split(".")[2]))];
  const size = Number.isInteger(run.manifest.parameters) ? `, ${run.manifest.parameters.toLocaleString("en")} parameters,` : "";
  return `${at["model.path"]}${size} was trained on ${parts.length ? parts.join(" and ") : at["data.task"] || at["data.source"]} with ${run.objective}: `
    + `${steps} of ${at["run.steps"]} steps, ${at["rollout.groups_per_step"]} groups of ${at["rollout.group_size"]} responses a step, learning rate ${at["learner.lr"]}, seed ${at.seed}.`;
}

function howItEnded(run) {
  const kinds = run.events.map((e) => e.kind), since = kinds.slice(kinds.lastIndexOf("start") + 1);
  if (since.includes("trained")) return "It finished.";
  if (since.includes("stopped")) return "It was stopped and has a checkpoint.";
  if (run.running) return run.starting ? "The run is starting: no step is done yet." : "It is running.";
  return kinds.length ? "No end was recorded: it failed, was killed, or is a copy of a run under way." : "";
}

function head(run) {
  const [mood, title] = VERDICT[run.health.kind] || ["fair", run.health.kind];
  const h = run.health;
  return [
    el("h1", {}, run.name), el("p", { class: "lead" }, whatHappened(run), " ", el("span", { class: "end" }, howItEnded(run))),
    run.notes.map((note) => el("p", { class: "missing" }, note)),
    el("nav", { "aria-label": "sections" }, [["curves", "Curves"], ["tokens", "Tokens"], ["forks", "Forking tokens"], ["events", "Events"], ["settings", "Settings"]].map(([id, name]) => el("a", { href: `#${id}` }, name)),
      source.follow || !run.heldout.after.prompts ? null : ["before", "after"].map((name) => el("a", { href: `eval-${name}.html` }, `Held-out answers ${name}`))),
    el("div", { class: "tiles" }, tiles(run).map(([name, value]) => el("div", { class: "tile" }, el("b", {}, value), el("span", {}, name)))),
    el("section", { class: `health ${mood}`, "aria-label": "verdict" }, el("h2", {}, title), el("p", {}, sentence(h.words)),
      h.cause ? el("p", {}, `Cause: ${h.cause}.`, h.remedy ? el("b", {}, ` Try ${h.remedy}.`) : null) : null,
      h.rule ? el("p", { class: "note" }, `Rule: ${h.rule}. A start is the mean of the first 5 steps, what is now that of the last 10.`) : null,
      verdicts(run),
      [run.prediction, run.law].filter(Boolean).map((line) => el("p", { class: "note" }, sentence(line)))),
    el("section", { "aria-label": "equation" }, el("h2", {}, "The equation in effect ", el("small", {}, run.objective)), el("pre", { tabindex: 0, class: "equation", role: "region", "aria-label": "the equation" }, run.equation)),
  ];
}

// What the verdicts were before, where there were others.
function verdicts(run) {
  const said = run.events.filter((e) => e.kind === "health" && e.health).map((e) => [e.step, e.health]);
  return said.some(([, kind]) => kind !== run.health.kind) ? el("p", { class: "note" }, `Verdicts so far: ${said.map(([step, kind]) => `${kind} at step ${step}`).join(", ")}.`) : null;
}

const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1).replace(/\.?$/, ".");

function tiles(run) {
  const of = (key) => (run.metrics.values[key] || []).filter((v) => v !== null);
  const mean = (list) => list.reduce((a, b) => a + b, 0) / list.length;
  const found = [];
  for (const [key, name] of [["correct/mean", "share right"], ["entropy/mean", "entropy, nats per token"]]) {
    const all = of(key);
    if (all.length) found.push([`${name}, first 5 → last 5 steps`, `${mean(all.slice(0, 5)).toFixed(3)} → ${mean(all.slice(-5)).toFixed(3)}`]);
  }
  const { before, after } = run.heldout, most = Math.max(1, ...Object.keys(after).map((k) => Number(k.split("@")[1] || 1)));
  for (const [key, name] of [["greedy", "greedy"], ["pass@1", "sampled"], [`pass@${most}`, most > 1 ? `pass@${most}` : ""]]) {
    if (name && key in before && key in after) found.push([`held-out ${name}, before → after, ${after.prompts} prompts`, `${before[key].toFixed(3)} → ${after[key].toFixed(3)}`]);
  }
  for (const [key, name] of [["tokens/per_second", "tokens per second, median"], ["seconds/step", "seconds per step, median"]]) {
    const all = of(key).sort((a, b) => a - b);
    if (all.length) found.push([name, number(all[all.length >> 1], 3)]);
  }
  return found;
}

let shownKind = "";
function eventsSection(run) {
  const count = new Map();
  run.events.forEach((e) => count.set(e.kind, (count.get(e.kind) || 0) + 1));
  const most = 100;
  const list = el("div", {});
  const draw = () => {
    const of = run.events.filter((e) => !shownKind || e.kind === shownKind);
    const rows = of.slice(-most).reverse().map((e) => [e.kind, e.at === undefined || !run.metrics.steps.length ? "–" : button(`${e.step === null ? "about " : ""}${e.at}`, () => { mark(e.at); document.getElementById("curves").scrollIntoView(); }, { class: "link" }), e.time.slice(0, 19).replace("T", " "), el("code", { class: "text" }, visible(e.fields))]);
    list.replaceChildren(table(["kind", "step", "time (UTC)", "fields"], rows, "events"), el("p", { class: "note" }, of.length > most ? `The newest ${most} of ${of.length}.` : ""));
  };
  draw();
  return [el("h2", { id: "events-title" }, "Events"), run.events.length ? el("div", { class: "bar" }, choice("Kind", [["", `all (${run.events.length})`], ...[...count].map(([k, n]) => [k, `${k} (${n})`])], shownKind, (k) => { shownKind = k; draw(); })) : null,
    run.events.length ? list : el("p", {}, "None.")];
}

function settingsSection(run) {
  const list = el("div", {}), differs = el("input", { type: "checkbox", checked: true, onchange: () => draw() });
  const search = el("input", { type: "search", placeholder: "name or value", oninput: () => draw() });
  const manifest = el("details", {}, el("summary", {}, "Machine and versions"), el("pre", { tabindex: 0 }, JSON.stringify(run.manifest, null, 1)));
  const draw = () => {
    const word = search.value.toLowerCase();
    const kept = run.settings.filter(([n, v, d]) => (!differs.checked || v !== d) && (!word || `${n} ${v}`.toLowerCase().includes(word)));
    list.replaceChildren(el("p", { class: "note", role: "status" }, `${kept.length} of ${run.settings.length} settings.`),
      table(["setting", "value", "default"], kept.slice(0, 250).map(([n, v, d]) => [el("code", {}, n), el("code", { class: v === d ? "text" : "text differs" }, visible(v)), el("code", { class: "text" }, v === d ? "the same" : visible(d) || "none")]), "settings"));
  };
  draw();
  return [el("h2", { id: "settings-title" }, "Settings"), el("div", { class: "bar" }, el("label", { class: "field" }, el("span", {}, "Search"), search), el("label", { class: "field" }, differs, el("span", {}, "only what differs from the defaults"))),
    run.settings.length ? list : el("p", { class: "missing" }, "Nothing from config.yaml."), manifest];
}

// Whoever moves by keys keeps the place; what is being chosen from is drawn again later.
function fill(id, make) {
  const node = document.getElementById(id), held = node.contains(document.activeElement) && document.activeElement;
  if (held && held.matches("input, select")) return held.addEventListener("blur", () => setTimeout(() => fill(id, make)), { once: true });
  const place = held ? [...node.querySelectorAll(held.tagName)].indexOf(held) : -1;
  node.replaceChildren(...make().flat().filter(Boolean));
  if (held) node.querySelectorAll(held.tagName)[place]?.focus({ preventScroll: true });
}

function render(run, before) {
  document.title = `${run.name}: ${run.objective} · entroray`;
  fill("top", () => head(run));
  if (before && view.grid && run.metrics.steps.length) followCurves(run);
  else {
    fill("curves", () => curvesSection(run));
    if (run.metrics.steps.length) zoom();
  }
  if (before && look.parts && run.recorded.length) followTokens(run);
  else {
    fill("tokens", () => tokensSection(run));
    fill("forks", () => forksSection(run));
  }
  fill("events", () => eventsSection(run));
  if (JSON.stringify([run.settings, run.manifest]) !== JSON.stringify([before?.settings, before?.manifest])) fill("settings", () => settingsSection(run));
}

async function start() {
  let run = await source.run(), turn = Promise.resolve();
  render(run);
  readAddress();
  window.addEventListener("hashchange", readAddress);
  source.follow?.((version) => {
    turn = turn.then(async () => {
      if (version <= run.version) return;
      const before = run;
      run = await source.run();
      run.name === before.name ? render(run, before) : location.reload();
    }).catch((error) => console.log(error));
  });
}

let resized = 0;
window.addEventListener("resize", () => { cancelAnimationFrame(resized); resized = requestAnimationFrame(() => view.charts.forEach((chart) => chart.draw())); });
start();
