// The page of runs over each other: charts of bands, and in words what differs, what was reached and by whom.

const data = JSON.parse(document.getElementById("data").textContent);
const FEW = 8;
const REACHED = [
  ["correct/mean", "right, first 5 steps", (all) => mean(all.slice(0, 5))], ["correct/mean", "right, last 5 steps", (all) => mean(all.slice(-5))],
  ["eval/greedy", "greedy, last", (all) => all.at(-1)], ["entropy/mean", "entropy, first 5 steps", (all) => mean(all.slice(0, 5))],
  ["entropy/mean", "entropy, last 5 steps", (all) => mean(all.slice(-5))], ["tokens/per_second", "tokens per second, median", (all) => [...all].sort((a, b) => a - b)[all.length >> 1]],
];
const shown = { smooth: data.smooth, apart: false, more: [], places: [] };

class BandChart extends Chart {
  constructor(place, plot) {
    super(view.run, { ...plot, curves: place.curves(plot.key) });
    Object.assign(this, { place, hidden: place.hidden });
    if (place.bands.length > FEW) this.keys.tabIndex = 0;
    this.svg.addEventListener("pointermove", (event) => this.point(event));
    this.svg.addEventListener("pointerleave", () => place.focus(null));
  }

  drawn(curve, line, before, y) {
    const node = super.drawn(curve, line, before, y);
    return node && el("svg:g", { "data-band": curve.band, class: curve.thin ? "thin" : null }, (curve.thin || this.place.bands.length > FEW) && line.length > 1 && node.length ? node[0] : node);
  }

  firsts() { return this.curves.filter((c, i) => c.band !== this.curves[i - 1]?.band && !this.hidden.has(c.key)); }

  mark() {
    if (!this.curves.length || !this.line) return;
    this.line.setAttribute("d", `M${this.x(view.marker).toFixed(1)} ${edge.top}V${edge.height - edge.bottom}`);
    const found = this.firsts().map((c) => [c, saidAt(c, view.marker)]);
    if (this.place.bands.length > FEW) found.sort((a, b) => b[1].y - a[1].y);
    const said = found.map(([c, { at, text }]) => [c, text + (at === view.marker ? "" : ` at ${at}`)]);
    this.keys.replaceChildren(...said.map(([c, text]) => el("span", { class: "key", "data-band": c.band }, swatch(c), `${c.name} `, el("b", {}, text))));
    this.svg.setAttribute("aria-valuenow", view.marker);
    this.svg.setAttribute("aria-valuetext", `step ${view.marker}: ${said.map(([c, text]) => `${c.name} ${text}`).join(", ")}`);
  }

  // The band nearest to the pointer stands out, here and in every chart beside.
  point(event) {
    const y = event.clientY - this.svg.getBoundingClientRect().top, far = (c) => Math.abs(this.y(saidAt(c, view.marker).y) - y);
    const best = this.firsts().reduce((found, c) => (!found || far(c) < far(found) ? c : found), null);
    this.place.focus(best && far(best) < 60 ? best.band : null);
    const near = this.keys.querySelector(".near");
    if (near) this.keys.scrollTop = near.offsetTop - this.keys.offsetTop - 48;
  }
}

// Charts of some bands, under one list of their names.
class Place {
  constructor(bands, node) {
    Object.assign(this, { bands, node, hidden: new Set() });
    this.legend = el("div", { class: "bar names", role: "group", "aria-label": "runs drawn" }, bands.map((band, i) => this.name(band, i)),
      bands.length > 2 ? [button("all", () => this.show(true), { class: "link" }), button("none", () => this.show(false), { class: "link" })] : null);
    this.cards = el("div", { class: "cards" });
    node.replaceChildren(this.legend, this.cards);
    const keys = new Set(bands.flatMap((b) => b.runs).flatMap((run) => Object.keys(data.metrics[run].values)));
    const sets = [...keys].filter((key) => /^eval\/avg@\d+:/.test(key)).map((key) => ({ key, title: `Evaluated: ${key.replace(/^.*?:/, "")}`, unit: "share of answers",
      meaning: `Share of right answers of the evaluation set (${key}); step 0 is before training.` }));
    for (const plot of [...data.charts.filter((c) => keys.has(c.key)), ...sets, ...shown.more]) this.add(plot);
    if (!this.cards.childElementCount) this.cards.append(el("p", { class: "missing" }, "No step was measured yet."));
  }

  curves(key) { return this.bands.flatMap((band, i) => curvesOfBand(band, i, data.metrics, key, shown.smooth)); }

  add(plot) {
    const chart = new BandChart(this, plot);
    view.charts.push(chart);
    this.cards.append(chart.node);
    return chart;
  }

  name(band, i) {
    const near = () => this.focus(i), far = () => this.focus(null);
    return el("button", { type: "button", class: "key", "aria-pressed": true, "data-band": i, title: "show or hide", onpointerenter: near, onfocus: near, onpointerleave: far, onblur: far,
      onclick: () => { this.flip(i, this.hidden.has(`band ${i}`)); zoom(view.first, view.last); } }, swatch(wear(i)), `${band.name} `, el("b", {}, counted(band.runs.length, "run")));
  }

  flip(i, on) {
    on ? this.hidden.delete(`band ${i}`) : this.hidden.add(`band ${i}`);
    this.legend.children[i].setAttribute("aria-pressed", on);
  }

  show(on) {
    this.bands.forEach((_, i) => this.flip(i, on));
    zoom(view.first, view.last);
  }

  focus(i) {
    this.node.classList.toggle("focused", i !== null);
    this.node.querySelectorAll("[data-band]").forEach((each) => each.classList.toggle("near", each.dataset.band === String(i)));
  }
}

const swatch = (c) => el("i", { class: `swatch k-${c.colour} ${c.dash}` });

function bar() {
  const { steps } = view.run.metrics, where = el("output", {}), names = new Set(data.metrics.flatMap((m) => Object.keys(m.values)));
  const slider = el("input", { type: "range", min: 0, max: steps.length - 1, oninput: () => mark(steps[slider.value]) });
  const more = el("input", { list: "metrics", placeholder: "any metric", onchange: () => {
    const key = more.value.trim();
    if (!names.has(key)) return;
    shown.more.push({ key, title: key, unit: "", meaning: "Added by you; its definition is in the catalogue of metrics.", free: true });
    more.value = "";
    const added = shown.places.map((place) => place.add(shown.more.at(-1)));
    zoom(view.first, view.last);
    added[0].node.scrollIntoView({ block: "nearest" });
  } });
  view.listeners.push(() => { slider.value = steps.indexOf(view.marker); where.textContent = view.marker; });
  const smooth = choice("Mean of", [1, 5, 20].map((n) => [n, n === 1 ? "single steps" : `the last ${n} steps`]), shown.smooth, (n) => { shown.smooth = Number(n); drawn(); });
  const apart = el("input", { type: "checkbox", checked: !shown.apart, onchange: () => { shown.apart = !apart.checked; drawn(); } });
  document.getElementById("bar").replaceChildren(button("◀", () => moveMarker(-1), { "aria-label": "previous step" }),
    el("label", { class: "field grow" }, el("span", {}, "Step ", where), slider), button("▶", () => moveMarker(1), { "aria-label": "next step" }), button("All steps", () => zoom()), smooth,
    ...(data.about ? [el("label", { class: "field" }, apart, el("span", {}, "seeds as one band"))] : []),
    el("label", { class: "field" }, el("span", {}, "Add a curve"), more), el("datalist", { id: "metrics" }, [...names].sort().map((value) => el("option", { value }))));
}

// All charts anew; marker and zoom stay.
function drawn() {
  const { first, last } = view, bands = data.bands || [bandsOf(data.about, shown.apart)];
  view.charts = [];
  shown.places = [...document.querySelectorAll(".drawn")].map((node) => new Place(bands[node.dataset.place], node));
  if (data.about) words(bands[0]);
  zoom(first, last);
}

function ended(a) {
  const since = a.kinds.slice(a.kinds.lastIndexOf("start") + 1), resumed = a.kinds.filter((kind) => kind === "start").length - 1;
  const end = a.running ? "running" : since.includes("trained") ? "finished" : since.includes("stopped") ? "stopped" : "no end recorded";
  return resumed > 0 ? `${end}, resumed ${counted(resumed, "time")}` : end;
}

const codeOf = (a) => String(a.manifest.commit || a.manifest.packages?.entroray || "unknown");
const settingOf = (a, name) => (a.settings.length ? plain(new Map(a.settings).get(name)) : "unknown");

function warnings(bands) {
  const found = [...data.left_out, ...data.about.flatMap((a) => a.notes.filter((note) => note.includes("config.yaml")).map((note) => `${a.name}: ${note}`))];
  for (const band of bands) {
    const codes = [...counts(band.runs.map((i) => codeOf(data.about[i])))], ends = [...new Set(band.runs.map((i) => data.metrics[i].last))].sort((a, b) => a - b);
    if (codes.length > 1) found.push(`${band.name}: more than one version of the code: ${codes.map(([code, n]) => `${n} of ${code}`).join(", ")}`);
    if (ends.length > 1) found.push(`${band.name}: its runs end at steps ${ends.join(", ")}: the band ends at step ${ends[0]}, thin lines go on`);
  }
  return found;
}

// What is said of the runs above and below the curves.
function words(bands) {
  const n = data.about.length, names = bands.map((b) => b.name), firsts = bands.map((b) => data.about[b.runs[0]]), code = (text) => el("code", { class: "text" }, visible(text));
  const every = data.metrics[0].every > 1 ? ` Each point is the mean of ${data.metrics[0].every} steps.` : "", wide = bands.filter((b) => b.runs.length > 1).length, lines = bands.length - wide;
  document.getElementById("top").replaceChildren(el("h1", {}, `${counted(n, "run")} compared`),
    el("p", { class: "lead" }, wide ? `Runs that differ only in their seed are one band: ${[counted(wide, "band"), lines && counted(lines, "line")].filter(Boolean).join(" and ")}.` : "Each run is a line."),
    wide ? el("p", { class: "note" }, "A band is the mean of its runs and the 95 % percentile bootstrap interval of that mean, over the steps that all of them have; of 2 or 3 runs the interval is their range. "
      + "With few seeds it is too narrow: of normal data it holds the true mean 75 times in 100 with 3 seeds, 84 with 5, 90 with 10.") : "",
    el("p", { class: "note" }, `Point at a line for its name and values; press a name to hide it; drag across a chart to zoom, double-click for all steps.${every}`),
    ...warnings(bands).map((line) => el("p", { class: "missing" }, visible(line))));
  const values = (run, key) => measured({ ...data.metrics[run] }, key, 1).filter(([s]) => s > 0 || key.startsWith("eval/")).map((p) => p[1]);
  const reached = bands.map((band) => REACHED.map(([key, , of]) => band.runs.map((run) => values(run, key)).filter((all) => all.length).map(of)));
  const kept = REACHED.map((_, k) => k).filter((k) => reached.some((row) => row[k].length));
  const said = (list) => (list.length ? [`${number(mean(list))} `, list.length > 1 ? el("small", {}, `[${interval(list).map((v) => number(v)).join(", ")}]`) : ""] : "–");
  const differs = differing(data.about), section = (title, ...inner) => el("section", {}, el("h2", {}, title), inner);
  document.getElementById("words").replaceChildren(
    section("What they reached", table(["", "runs", ...kept.map((k) => REACHED[k][1])], bands.map((band, i) => [el("span", {}, swatch(wear(i)), ` ${band.name}`), String(band.runs.length), ...kept.map((k) => el("span", {}, said(reached[i][k])))]), "what they reached")),
    section("What differs", differs.length ? table(["setting", ...names], [...(differs.some((d) => d.startsWith("objective.")) ? [["objective", ...firsts.map((a) => a.objective)]] : []),
      ...differs.map((d) => [code(d), ...firsts.map((a) => code(settingOf(a, d)))])], "settings that differ") : el("p", {}, "Nothing but the seed, as far as their settings tell.")),
    section("Runs", table(["run", "drawn as", "seed", "steps", "state", "health", "code"], data.about.map((a, i) => [a.name, names[bands.findIndex((b) => b.runs.includes(i))],
      settingOf(a, "seed"), `${data.metrics[i].last} of ${settingOf(a, "run.steps")}`, ended(a), a.health, codeOf(a)]), "runs")));
}

const steps = [...new Set(data.metrics.flatMap((m) => m.steps))].sort((a, b) => a - b);
Object.assign(view, { run: { metrics: { steps: steps.length ? steps : [0], values: {} }, events: [], recorded: [], settings: [] }, charts: [], listeners: [], marker: steps.at(-1) ?? 0, first: undefined, last: undefined });
bar();
drawn();
let again = 0;
window.addEventListener("resize", () => { cancelAnimationFrame(again); again = requestAnimationFrame(() => view.charts.forEach((chart) => chart.draw())); });
