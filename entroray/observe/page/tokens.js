// The tokens of one recorded step: responses as text, coloured by a column, beside their siblings.

const NODES = 2400, SIBLINGS = 12;
const COLOUR = {
  entropy: ["entropy", "nats: how unsure the policy was"],
  varentropy: ["varentropy", "nats²: how unequal the choices were"],
  advantage: ["advantage", "after credit"],
  weight: ["weight = scale × advantage", "where the token is learnt from, before correction and clip"],
  gap: ["gap of the log-probs", "|learner − sampler|, nats"],
  lag: ["lag", "steps from the weights that sampled it to those it trains"],
  learnt: ["selection", "1 where the token is learnt from: unmasked and selected"],
};
const look = { run: null, block: null, colour: "entropy", group: null, alone: null, page: 0, windows: new Map(), token: null,
  filter: { verdict: "", status: "", shortest: "", longest: "", text: "" }, ask: 0 };

const matches = (r) => {
  const f = look.filter, text = f.text.toLowerCase();
  return (!f.verdict || Boolean(r.correct) === (f.verdict === "right")) && (!f.status || r.status === f.status)
    && (f.shortest === "" || r.stop - r.start >= Number(f.shortest)) && (f.longest === "" || r.stop - r.start <= Number(f.longest))
    && (!text || [look.block.response(r), r.prompt, r.answer, r.reference].some((t) => typeof t === "string" && t.toLowerCase().includes(text)));
};

function tokensSection(run) {
  look.run = run;
  const title = el("h2", { id: "tokens-title" }, "Tokens");
  Object.assign(look, { block: null, parts: null });
  if (!run.recorded.length) return [title, el("p", { class: "missing" }, run.starting ? "No step is done yet." : run.notes.find((n) => n.includes("tokens/")) || "Nothing from tokens/.")];
  look.parts = Object.fromEntries(["bar", "filters", "found", "legend", "siblings", "sure"].map((name) => [name, el("div", { class: name })]));
  look.parts.bar.className = "bar";
  look.parts.detail = el("aside", { class: "detail", tabindex: 0, "aria-live": "polite", "aria-label": "the chosen token" });
  const p = look.parts;
  p.siblings.addEventListener("focusin", (event) => event.target.dataset.i && chooseToken(Number(event.target.dataset.i)));
  p.siblings.addEventListener("pointerover", (event) => event.target.dataset?.i && chooseToken(Number(event.target.dataset.i)));
  const start = el("p", {}, button("Show the tokens of the last recorded step", () => openStep(look.run.recorded.at(-1)), { class: "primary" }));
  p.body = el("div", { onkeydown: keys }, start);
  for (const kind of ["focusin", "click", "change"]) p.body.addEventListener(kind, writeAddress);
  document.onkeydown = (event) => { if (event.target === document.body && look.block) keys(event); };
  look.seen = new IntersectionObserver((entries) => {
    if (entries.some((e) => e.isIntersecting) && !look.block && !look.ask) openStep(look.run.recorded.at(-1));
  });
  look.seen.observe(p.body);
  return [title, el("p", { class: "note" }, "Each response as the policy wrote it, a shade for each token. Point at a token, or move to it by Tab and the arrow keys, for all its columns. Underlined tokens were selected where not all are; dotted ones are masked.", run.recorded.length > 1 ? ` Recorded are ${run.recorded.length} steps from ${run.recorded[0]} to ${run.recorded.at(-1)} (observe.tokens.every).` : ""), p.body];
}

async function readStep(step) {
  if (!window.DecompressionStream) return "This browser cannot unpack the tokens (DecompressionStream): open the page with one of 2023 or newer.";
  try {
    return await readBlock(await source.step(Number(step)));
  } catch (error) {
    return `The tokens of step ${step} are damaged: ${error}`;
  }
}

async function openStep(step, rollout, position) {
  const ask = ++look.ask, p = look.parts, stamp = look.run.stamps?.[step];
  if (!look.block || look.block.step !== Number(step) || look.stamp !== stamp) {
    p.body.setAttribute("aria-busy", "true");
    const block = await readStep(step);
    if (ask !== look.ask) return;
    if (typeof block === "string") return p.body.replaceChildren(el("p", { class: "missing" }, block));
    Object.assign(look, { block, stamp });
    p.body.replaceChildren(p.bar, p.filters, p.found, p.sure, p.legend, el("div", { class: "reader" }, p.siblings, p.detail));
    p.body.removeAttribute("aria-busy");
    look.token = null;
    drawFilters();
    drawSure();
  }
  const r = look.block.rollouts.find((each) => each.rollout === rollout);
  if (rollout !== undefined && !r) return chooseGroup(look.block.groups[0]);
  if (r && !matches(r)) { Object.keys(look.filter).forEach((k) => { look.filter[k] = ""; }); drawFilters(); }
  const kept = shownGroups();
  chooseGroup(r ? r.group : kept.includes(look.group) ? look.group : kept[0] ?? look.block.groups[0]);
  if (r && position !== undefined) goTo(r.start + position);
}

// The address names what was chosen, so that a copied link shows it again; browsers allow few changes a second.
function writeAddress() {
  clearTimeout(look.told);
  look.told = setTimeout(() => {
    if (look.parts.body.hasAttribute("aria-busy")) return writeAddress();
    if (!look.block) return;
    const r = look.token === null ? null : look.block.rolloutOf(look.token);
    const told = { step: look.block.step, group: look.group, rollout: look.alone ?? r?.rollout, token: r ? look.token - r.start : undefined, alone: look.alone === null ? undefined : 1 };
    history.replaceState(null, "", `#${Object.entries(told).filter(([, value]) => value !== undefined).map(([name, value]) => `${name}=${value}`).join("&")}`);
  }, 300);
}

async function readAddress() {
  const said = new URLSearchParams(location.hash.slice(1)), of = (name) => (said.has(name) ? Number(said.get(name)) : undefined);
  if (!look.run.recorded.includes(of("step"))) return;
  document.getElementById("tokens").scrollIntoView();
  await openStep(of("step"), of("rollout"), of("token"));
  const known = look.block?.rollouts.some((r) => r.rollout === of("rollout"));
  if (known && of("alone")) alone(of("rollout"));
  else if (!known && look.block?.groups.includes(of("group"))) chooseGroup(of("group"));
}

// A later state of the run: the step that is looked at stays, unless its records went or were written again.
function followTokens(run) {
  const { run: before, block } = look, { recorded } = (look.run = run);
  if (block && !recorded.includes(block.step)) openStep(recorded.at(-1));
  else if (block && look.stamp !== run.stamps[block.step]) openStep(block.step);
  if (String(recorded) === String(before.recorded)) return;
  if (block) look.parts.bar.querySelector("select").replaceChildren(...recorded.map((s) => el("option", { value: s, selected: s === look.block.step }, s)));
  if (look.forked && !look.forks.contains(document.activeElement)) look.drawForks();
}

const shownGroups = () => look.block.groups.filter((g) => look.block.rollouts.some((r) => r.group === g && matches(r)));

function drawFilters() {
  const f = look.filter, block = look.block;
  const set = (name) => (value) => { f[name] = value; const kept = shownGroups(); chooseGroup(kept.includes(look.group) ? look.group : kept[0] ?? look.group); };
  const box = (label, name, type) => el("span", { class: "field" }, el("span", { "aria-hidden": "true" }, label),
    el("input", { type, "aria-label": label, value: f[name], size: 14, min: type === "number" ? 0 : null, onchange: (event) => set(name)(event.target.value) }));
  const statuses = [...new Set(block.rollouts.map((r) => r.status).filter(Boolean))];
  look.parts.filters.className = "bar";
  look.parts.filters.replaceChildren(
    choice("Verdict", [["", "all"], ["right", "right"], ["wrong", "wrong"]], f.verdict, set("verdict")),
    choice("Status", [["", "all"], ...statuses.map((s) => [s, s])], f.status, set("status")),
    box("Tokens from", "shortest", "number"), box("Tokens to", "longest", "number"), box("Text", "text", "search"));
}

function drawBar() {
  const block = look.block, groups = shownGroups(), at = groups.indexOf(look.group);
  const name = (g) => {
    const of = block.rollouts.filter((r) => r.group === g), right = of.filter((r) => r.correct).length;
    return `${g}: ${right} of ${of.length} right${of[0].prompt ? `, ${oneLine(of[0].prompt, 40)}` : ""}`;
  };
  const near = groups.length > 400 ? groups.slice(Math.max(0, at - 200), Math.max(0, at - 200) + 400) : groups;
  const members = block.rollouts.filter((r) => r.group === look.group);
  const steps = look.run.recorded;
  look.parts.bar.replaceChildren(
    choice("Step", steps.map((s) => [s, s]), block.step, (s) => openStep(s)),
    choice("Group", near.map((g) => [g, name(g)]), look.group, (g) => chooseGroup(Number(g))),
    button("◀", () => moveGroup(-1), { "aria-label": "previous group", disabled: at <= 0 }),
    button("▶", () => moveGroup(1), { "aria-label": "next group", disabled: at >= groups.length - 1 }),
    choice("Rollout", [["", "all siblings"], ...members.map((r) => [r.rollout, `${r.rollout}${r.correct ? ", right" : ", wrong"}`])], look.alone ?? "", (r) => alone(r === "" ? null : Number(r))),
    choice("Colour", Object.entries(COLOUR).filter(([key]) => has(key)).map(([key, [text]]) => [key, text]), look.colour, (key) => { look.colour = key; drawGroup(); }));
  const kept = block.rollouts.filter(matches).length;
  const sampled = block.tokens < block.recorded ? ` A sample: whole groups with ${block.tokens.toLocaleString("en")} of ${block.recorded.toLocaleString("en")} tokens; all are in tokens/.` : "";
  look.parts.found.replaceChildren(el("p", { class: "note" }, `${kept} of ${block.rollouts.length} rollouts match, in ${groups.length} groups.${sampled} Keys: n and p for the next and the previous rollout that matches, Shift for groups, arrows for tokens, u for the next unsure token.`));
}

const has = (key) => ({ lag: "version", learnt: "word", weight: "advantage" })[key] ? look.block.has({ lag: "version", learnt: "word", weight: "advantage" }[key]) : look.block.has(key);

function chooseGroup(group) {
  if (group !== look.group) { look.alone = null; look.page = 0; look.windows.clear(); }
  look.group = group;
  drawGroup();
}

function moveGroup(by) {
  const groups = shownGroups(), at = groups.indexOf(look.group) + by;
  if (groups[at] !== undefined) chooseGroup(groups[at]);
}

function alone(rollout) {
  look.alone = rollout;
  drawGroup();
}

function moveRollout(by) {
  const list = look.block.rollouts.filter(matches);
  const now = list.findIndex((r) => r.rollout === (look.alone ?? look.block.rolloutOf(look.token)?.rollout ?? -1));
  const next = list[now < 0 ? 0 : now + by];
  if (!next) return;
  if (next.group !== look.group) chooseGroup(next.group);
  look.alone = next.rollout;
  drawGroup();
  look.parts.siblings.querySelector("[data-i]")?.focus();
}

function drawGroup() {
  const block = look.block, members = block.rollouts.filter((r) => r.group === look.group);
  const many = members.filter((r) => look.alone === null || r.rollout === look.alone);
  const shown = many.slice(look.page * SIBLINGS, (look.page + 1) * SIBLINGS);
  const wide = Math.max(60, Math.floor(NODES / Math.max(1, shown.length)));
  drawBar();
  drawLegend();
  const pages = Math.ceil(many.length / SIBLINGS);
  const turn = (by) => { look.page += by; drawGroup(); };
  look.parts.siblings.replaceChildren(groupHead(members),
    ...(pages > 1 ? [el("p", { class: "note" }, button("◀", () => turn(-1), { disabled: !look.page, "aria-label": "earlier siblings" }), ` siblings ${look.page * SIBLINGS + 1} to ${look.page * SIBLINGS + shown.length} of ${many.length} `, button("▶", () => turn(1), { disabled: look.page >= pages - 1, "aria-label": "later siblings" }))] : []),
    el("div", { class: look.alone === null ? "together" : "single" }, shown.map((r) => card(r, wide))));
  const first = look.parts.siblings.querySelector("[data-i]");
  if (first) first.tabIndex = 0;
  if (look.token === null || !look.parts.siblings.querySelector(`[data-i="${block.cell(look.token)[0]}"]`)) {
    look.token = null;
    look.parts.detail.replaceChildren(el("h3", {}, "Token"), el("p", { class: "note" }, "Point at a token."));
  } else chooseToken(look.token);
}

function groupHead(members) {
  const [r] = members;
  if (!r) return el("p", { class: "missing" }, "No rollout matches.");
  const told = [["prompt", r.prompt], ["reference", r.reference], ["domain", r.domain]].filter(([, t]) => typeof t === "string" && t !== "");
  return el("div", { class: "asked" }, told.length ? el("dl", {}, told.map(([name, text]) => [el("dt", {}, name), el("dd", { class: "text", dir: "auto" }, visible(text))]))
    : el("p", { class: "note" }, `Prompt ${r.prompt_id}: its text was not recorded with this step.`));
}

function card(r, wide) {
  const block = look.block, verdict = r.correct ? "right" : "wrong", length = r.stop - r.start;
  const start = Math.min(look.windows.get(r.rollout) ?? 0, Math.max(0, length - 1)), stop = Math.min(length, start + wide);
  const move = (to) => { look.windows.set(r.rollout, Math.max(0, to)); drawGroup(); };
  const facts = [`reward ${number(Number(r.reward ?? NaN))}`, `${length} tokens`, `mean entropy ${number(block.mean("entropy", r))}`];
  if (r.status && r.status !== "ok") facts.push(r.status);
  if (r.replayed) facts.push("replayed");
  if (r.parent !== null && r.parent !== undefined) facts.push(`branch of ${r.parent}`);
  const said = [];
  if (r.answer !== undefined) said.push(["answer", r.answer ?? "none found"]);
  if (r.parts) said.push(["parts", Object.entries(r.parts).map(([k, v]) => `${k} ${number(v)}`).join(", ")]);
  if (r.detail) said.push(["detail", r.detail]);
  if (r.version_first !== undefined) said.push(["weights", r.version_first === r.version_last ? `version ${r.version_first}` : `versions ${r.version_first} to ${r.version_last}`]);
  if (r.seed !== null && r.seed !== undefined) said.push(["seed", String(r.seed)]);
  const spans = [];
  for (let i = r.start + start; i < r.start + stop; i++) if (block.text(i) !== null) spans.push(span(i));
  return el("article", { class: `card rollout ${verdict}${matches(r) ? "" : " apart"}` },
    el("h4", {}, button(`Rollout ${r.rollout}`, () => alone(look.alone === null ? r.rollout : null), { class: "link", title: "alone, or beside its siblings" }),
      el("b", { class: `verdict ${verdict}` }, r.correct ? "✓ right" : "✗ wrong"), el("small", {}, facts.join(" · "))),
    el("p", { class: "response text", dir: "auto" }, spans.length ? spans : el("i", {}, "no token")),
    length > stop - start ? el("p", { class: "note" }, button("◀", () => move(start - wide), { disabled: !start, "aria-label": "earlier tokens" }),
      ` tokens ${start + 1} to ${stop} of ${length} `, button("▶", () => move(start + wide), { disabled: stop >= length, "aria-label": "later tokens" })) : null,
    said.length ? el("dl", { class: "facts" }, said.map(([name, text]) => [el("dt", {}, name), el("dd", { class: "text" }, visible(text))])) : null);
}

function span(i) {
  const block = look.block, shade = block.shade(look.colour, i);
  const masked = block.mask(i) !== null;
  const style = ["t", shade === null ? "" : `s${shade}`, masked ? "masked" : block.number("selected", i) === 1 && someUnselected() ? "chosen" : ""];
  return el("span", { class: style.filter(Boolean).join(" "), "data-i": i, tabindex: -1 }, visible(block.text(i)));
}

function someUnselected() {
  const block = look.block;
  if (block.unselected === undefined) {
    block.unselected = false;
    for (let i = 0; block.has("selected") && i < block.tokens && !block.unselected; i++) block.unselected = block.number("selected", i) === 0 && block.mask(i) === null;
  }
  return block.unselected;
}

function drawLegend() {
  const [low, high] = look.block.limits(look.colour), [name, unit] = COLOUR[look.colour];
  look.parts.legend.replaceChildren(el("span", {}, number(low, 3)), el("span", { class: "ramp", "aria-hidden": "true" }, Array.from({ length: SHADES }, (_, i) => el("i", { class: `s${i}` }))),
    el("span", {}, `${number(high, 3)}${["learnt", "lag"].includes(look.colour) ? "" : " and more"}`), el("small", {}, `${name}, ${unit}`));
}

function chooseToken(i) {
  const block = look.block, [first, after] = block.cell(i);
  const old = look.parts.siblings.querySelector(".here");
  if (old) { old.classList.remove("here"); old.tabIndex = -1; }
  const node = look.parts.siblings.querySelector(`[data-i="${first}"]`);
  if (!node) return;
  node.classList.add("here");
  node.tabIndex = 0;
  look.token = first;
  const r = block.rolloutOf(first);
  look.parts.detail.replaceChildren(el("h3", {}, "Token ", el("code", { class: "text" }, visible(block.text(first) ?? ""))),
    ...(after - first > 1 ? [el("p", { class: "note" }, `${after - first} tokens are one piece of text here.`)] : []),
    ...Array.from({ length: Math.min(4, after - first) }, (_, k) => columns(first + k, r)));
}

function columns(i, r) {
  const block = look.block, rows = [], about = Object.fromEntries(look.run.columns.map(([n, unit, meaning]) => [n, [unit, meaning]]));
  const add = (name, value, unit, meaning) => rows.push(el("dt", { title: meaning }, name), el("dd", {}, value, unit ? el("small", {}, ` ${unit}`) : null));
  const mask = block.mask(i), learnt = block.learnt(i);
  const why = mask !== null ? `no: masked, ${mask}` : block.number("selected", i) === 0 ? "no: not selected" : learnt ? "yes" : "no: its advantage or scale is 0";
  add("learnt from", why, "", "whether the update can move it");
  if (block.has("logprob_old")) add("probability", number(Math.exp(block.number("logprob_old", i)), 3), "", "of the token under the learner before the update");
  for (const [name] of look.run.columns) {
    const [unit, meaning] = about[name];
    if (name === "logprob_behavior" && block.has("gap") && block.has("logprob_old")) {
      add(name, number(block.number("logprob_old", i) - block.number("gap", i), 3), unit, meaning);
      add("gap", number(block.number("gap", i), 3), "nats", "logprob_old less logprob_behavior");
    } else if (name === "token_id") add(name, String(block.words[block.number("word", i)][0]), unit, meaning);
    else if (name === "position") add(name, String(i - r.start), unit, meaning);
    else if (name === "rollout") add(name, String(r.rollout), unit, meaning);
    else if (name === "selected" && block.has(name)) add(name, block.number(name, i) === 1 ? "yes" : "no", unit, meaning);
    else if (name === "mask_reason" && block.has(name)) add(name, mask ?? "none", unit, meaning);
    else if (block.has(name)) add(name, number(block.number(name, i), 3), unit, meaning);
  }
  if (block.has("version")) add("lag", String(block.value("lag", i)), "steps", COLOUR.lag[1]);
  return el("dl", { class: "facts" }, rows);
}

// To a token by its place in the block, wherever it is.
function goTo(i) {
  const block = look.block, r = block.rolloutOf(i);
  if (!r) return;
  if (r.group !== look.group) chooseGroup(r.group);
  const members = block.rollouts.filter((each) => each.group === r.group);
  look.page = look.alone === null ? Math.floor(members.indexOf(r) / SIBLINGS) : 0;
  if (look.alone !== null) look.alone = r.rollout;
  const wide = Math.max(60, Math.floor(NODES / (look.alone === null ? Math.min(SIBLINGS, members.length - look.page * SIBLINGS) : 1)));
  look.windows.set(r.rollout, Math.floor((i - r.start) / wide) * wide);
  drawGroup();
  const node = look.parts.siblings.querySelector(`[data-i="${block.cell(i)[0]}"]`);
  if (node) { node.focus(); node.scrollIntoView({ block: "center" }); }
}

function keys(event) {
  if (/^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName) || event.ctrlKey || event.metaKey || event.altKey) return;
  const token = event.target.dataset?.i;
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (token && step) {
    const all = [...look.parts.siblings.querySelectorAll("[data-i]")], next = all[all.indexOf(event.target) + step];
    if (next) next.focus();
  } else if (event.key === "n" || event.key === "p") moveRollout(event.key === "n" ? 1 : -1);
  else if (event.key === "N" || event.key === "P") moveGroup(event.key === "N" ? 1 : -1);
  else if (event.key === "u" && look.sure.length) {
    const at = look.sure.indexOf(look.token);
    goTo(look.sure[(at + 1) % look.sure.length]);
  } else return;
  event.preventDefault();
}
