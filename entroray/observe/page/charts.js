// Curves over steps: one marker and one zoom for all; values at the marker are in each chart's key.

const PHASES = ["sample", "score", "update", "sync"];
const view = { first: 0, last: 1, marker: 0, charts: [], listeners: [] };
const edge = { left: 52, right: 12, top: 10, bottom: 24, height: 220 };

function plotsOf(run) {
  const values = run.metrics.values;
  const named = (start) => Object.keys(values).filter((key) => key.startsWith(start));
  const colours = ["teal", "indigo", "orange", "purple", "red", "cyan", "pink", "green", "grey"];
  const curves = (keys, start) => keys.map((key, i) => (
    { key, name: key.slice(start.length), colour: colours[i % colours.length], dash: i >= colours.length ? "dot" : "" }));
  const plots = [...run.plots];
  if (named("reward/part_").length) plots.push({ title: "Parts of the reward", unit: "each its own",
    meaning: "Mean of each part of the verdicts before its weight, over a step's judged rollouts.",
    curves: curves(named("reward/part_"), "reward/part_") });
  const knob = (name) => JSON.parse((run.settings.find(([n]) => n === `control.${name}.knob`) || ["", '"a setting"'])[1]);
  for (const key of named("control/")) plots.push({ title: `${knob(key.slice(8))}, moved by ${key.slice(8)}`, unit: "",
    meaning: "The value that the controller had in effect in each step.", free: true,
    curves: [{ key, name: "value", colour: "orange" }] });
  const sum = (key) => (values[key] || []).reduce((all, v) => all + (v || 0), 0);
  const phases = named("seconds/").filter((key) => key !== "seconds/step" && sum(key) > 0.002 * sum("seconds/step"));
  phases.sort((a, b) => (PHASES.indexOf(a.slice(8)) + 9) % 9 - (PHASES.indexOf(b.slice(8)) + 9) % 9);
  plots.push({ title: "Time by phase", unit: "seconds per step", stacked: true, 
    curves: curves(phases, "seconds/").map((curve) => ({ ...curve, always: true })),
    meaning: "Wall-clock time of each phase; phases that overlap can add up to more than the step. A phase below 0.2 % of the time is left out." });
  plots.push({ title: "The law", law: true, unit: "share right over nats per token", curves: [{ key: "correct/mean", over: "entropy/mean", name: "share right" }],
    meaning: "Share right of each step against its mean entropy, later steps stronger; the line is R = b − a eᴴ as last fitted (arXiv 2505.22617), an early warning and no forecast." });
  for (const key of Object.keys(values)) {
    const [, n, name] = key.match(/^eval\/avg@(\d+):(.+)$/) || [];
    if (name) plots.push(setPlot(n, name));
  }
  return plots;
}

function setPlot(n, name) {
  const of = (metric, label, more) => ({ key: `eval/${metric}@${n}${more?.end || ""}:${name}`, name: label, colour: "indigo", ...more });
  return { title: `Evaluated: ${name}`, unit: "share",
    meaning: "Share of right answers with its 95 % interval over prompts, and the share of prompts that one of the samples, or their majority, gets right; step 0 is before training.",
    curves: [of("avg", "low", { end: "_low", width: 0 }), of("avg", "95 % interval", { end: "_high", width: 0, fill: true }),
      of("avg", `avg@${n}`), of("pass", `pass@${n}`, { colour: "teal", dash: "dot" }), of("maj", `maj@${n}`, { colour: "orange", dash: "dot" })] };
}

// First and last numbers of each evaluation set, with 95 % bootstrap intervals over prompts.
function setsTable(run) {
  const { steps, values } = run.metrics, rows = [];
  for (const [, n, name] of Object.keys(values).map((key) => key.match(/^eval\/avg@(\d+):(.+)$/) || []).filter((m) => m.length)) {
    const at = steps.map((_, i) => i).filter((i) => values[`eval/avg@${n}:${name}`][i] !== null);
    for (const i of new Set([at[0], at.at(-1)])) {
      const of = (metric) => number(values[`eval/${metric}:${name}`]?.[i], 3);
      rows.push([name, String(steps[i]), `avg@${n} ${of(`avg@${n}`)} [${of(`avg@${n}_low`)}, ${of(`avg@${n}_high`)}]`, of(`pass@${n}`), of(`maj@${n}`),
        of("length/mean"), of("length/truncated"), of("entropy/mean"), of("failed")]);
    }
  }
  return rows.length ? [el("h3", {}, "Evaluation sets, first and last ", el("small", {}, "95 % bootstrap intervals over prompts")),
    table(["set", "step", "right", "one of n", "majority", "tokens", "truncated", "entropy, nats", "failed"], rows, "evaluation sets")] : [];
}

function points(run, curve) {
  if (curve.points) return curve.points;
  const { steps, values } = run.metrics;
  const own = values[curve.key] || [];
  const factor = curve.times ? values[curve.times] || [] : null;
  const found = [];
  own.forEach((value, i) => {
    const y = curve.always ? value ?? 0 : factor ? (factor[i] === null || factor[i] === undefined || value === null ? null : value * factor[i]) : value;
    const x = curve.over ? values[curve.over]?.[i] ?? null : 0;
    if (y !== null && y !== undefined && x !== null) found.push([steps[i], y, x]);
  });
  return found;
}

function ticks(low, high, most) {
  const rough = (high - low) / most, power = 10 ** Math.floor(Math.log10(rough));
  const apart = [1, 2, 5, 10].find((m) => m * power >= rough) * power;
  const found = [];
  for (let at = Math.ceil(low / apart - 1e-9) * apart; at <= high + apart * 1e-9; at += apart) found.push(Number(at.toPrecision(10)));
  return found;
}

function stack(lines) {
  const total = new Map();
  return lines.map((line) => line.map(([x, y]) => {
    const low = total.get(x) || 0;
    total.set(x, low + y);
    return [x, low + y, low];
  }));
}

class Chart {
  constructor(run, plot) {
    this.hidden = new Set();
    this.keys = el("p", { class: "keys" });
    this.svg = el("svg:svg", { class: "plot", tabindex: 0, role: "slider", "aria-label": `${plot.title}: step marker` });
    this.missing = el("p", { class: "missing" }, `Nothing from metrics.jsonl: it holds none of ${plot.curves.map((c) => c.key).join(", ")}.`);
    this.node = el("article", { class: "card" }, el("h3", {}, plot.title, " ", el("small", {}, plot.unit)),
      el("p", { class: "note" }, plot.meaning), this.keys, this.missing);
    this.feed(run, plot);
    this.listen();
  }

  // The curves of this or of a later state of the run.
  feed(run, plot) {
    Object.assign(this, { run, plot });
    this.curves = plot.curves.map((curve) => ({ ...curve, points: points(run, curve) })).filter((c) => c.points.length);
    this.svg.setAttribute("aria-valuemin", run.metrics.steps[0]);
    this.svg.setAttribute("aria-valuemax", run.metrics.steps.at(-1));
    const [shown, other] = this.curves.length ? [this.svg, this.missing] : [this.missing, this.svg];
    if (other.isConnected || other.parentNode) other.replaceWith(shown);
  }

  listen() {
    let from = null;
    const at = (event) => this.at(event);
    this.svg.addEventListener("pointerdown", (event) => { from = event.pointerType === "touch" || this.plot.law ? null : at(event); mark(at(event)); });
    this.svg.addEventListener("pointermove", (event) => mark(at(event)));
    this.svg.addEventListener("pointerup", (event) => {
      const to = at(event);
      if (from !== null && Math.abs(to - from) > (view.last - view.first) / 25) zoom(Math.min(from, to), Math.max(from, to));
      from = null;
    });
    this.svg.addEventListener("dblclick", () => zoom());
    this.svg.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: -1, ArrowRight: 1, ArrowDown: -1, ArrowUp: 1, PageDown: -10, PageUp: 10 }[event.key];
      if (move) moveMarker(move);
      else if (event.key === "Home") mark(view.first);
      else if (event.key === "End") mark(view.last);
      else if (event.key === "+" || event.key === "-") zoomBy(event.key === "+" ? 0.5 : 2);
      else if (event.key === "0") zoom();
      else return;
      event.preventDefault();
    });
  }

  at(event) { return view.first + (event.clientX - this.svg.getBoundingClientRect().left - edge.left) / (this.width - edge.left - edge.right) * (view.last - view.first); }

  draw() {
    if (!this.curves.length) return;
    const width = this.width = Math.max(260, this.svg.clientWidth || this.node.clientWidth - 40), height = edge.height;
    const shown = this.curves.filter((c) => !this.hidden.has(c.key));
    const inside = ([x]) => x >= view.first && x <= view.last;
    let lines = shown.map((c) => c.points.filter((p, i) => inside(p) || inside(c.points[i + 1] || p) || inside(c.points[i - 1] || p)));
    if (this.plot.stacked) lines = stack(lines);
    const values = lines.flat().map((p) => p[1]);
    let low = Math.min(...values), high = Math.max(...values);
    const log = this.plot.log && low > 0 && high > 10 * low;
    if (!log && !this.plot.free) [low, high] = [Math.min(0, low), Math.max(0, high)];
    if (!(high > low)) [low, high] = low ? [low - Math.abs(low) / 2, high + Math.abs(high) / 2] : [0, 1];
    const scale = log ? Math.log10 : (v) => v;
    const y = this.y = (v) => height - edge.bottom - (scale(v) - scale(low)) / (scale(high) - scale(low)) * (height - edge.top - edge.bottom);
    this.x = (s) => edge.left + (s - view.first) / (view.last - view.first || 1) * (width - edge.left - edge.right);
    const rows = log ? ticks(Math.ceil(scale(low)), Math.max(scale(high), Math.ceil(scale(low)) + 1), 5).filter(Number.isInteger).map((p) => 10 ** p).filter((v) => v >= low && v <= high) : ticks(low, high, 5);
    const columns = ticks(view.first, view.last, width / 70).filter(Number.isInteger);
    const marks = eventSteps(this.run).map((s) => `M${this.x(s).toFixed(1)} ${edge.top}V${height - edge.bottom}`).join("");
    this.line = el("svg:path", { class: "marker" });
    this.frame(rows, y, columns, [el("svg:path", { class: "happened", d: marks }), lines.map((line, i) => this.drawn(shown[i], line, lines[i - 1], y))]);
  }

  // Values at the left and below; `inside` is cut at the edges, the marker is above it.
  frame(rows, y, columns, inside) {
    const { width } = this, { height } = edge, clip = `clip${view.charts.indexOf(this)}`;
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.svg.replaceChildren(
      el("svg:clipPath", { id: clip }, el("svg:rect", { x: edge.left - 2, y: 0, width: width - edge.left - edge.right + 4, height })),
      el("svg:path", { class: "grid", d: rows.map((v) => `M${edge.left} ${y(v).toFixed(1)}H${width - edge.right}`).join("") }),
      ...rows.map((v) => el("svg:text", { x: edge.left - 6, y: (y(v) + 4).toFixed(1), "text-anchor": "end" }, number(v, 3))),
      ...columns.map((v) => el("svg:text", { x: this.x(v).toFixed(1), y: height - 6, "text-anchor": "middle" }, number(v))),
      el("svg:g", { "clip-path": `url(#${clip})` }, inside, this.line));
    this.mark();
  }

  drawn(curve, line, before, y) {
    const path = (list, at) => list.map((p) => `${this.x(p[0]).toFixed(1)} ${y(at(p)).toFixed(1)}`).join("L");
    const style = `k-${curve.colour} ${curve.dash || ""}${curve.width && curve.width < 2 ? " slim" : ""}`;
    const high = (p) => p[1];
    if (this.plot.stacked || (curve.fill && before)) {
      const under = this.plot.stacked ? path([...line].reverse(), (p) => p[2]) : path([...before].reverse(), high);
      return line.length ? el("svg:path", { class: `area ${style}${this.plot.stacked ? " stacked" : ""}`, d: `M${path(line, high)}L${under}Z` }) : null;
    }
    if (curve.width === 0 || !line.length) return null;
    if (line.length < 40) return [el("svg:path", { class: `line ${style}`, d: `M${path(line, high)}` }),
      el("svg:path", { class: `dots ${style}`, d: line.map((p) => `M${path([p], high)}h0`).join("") })];
    return el("svg:path", { class: `line ${style}`, d: `M${path(line, high)}` });
  }

  mark() {
    if (!this.curves.length || !this.line) return;
    this.line.setAttribute("d", `M${this.x(view.marker).toFixed(1)} ${edge.top}V${edge.height - edge.bottom}`);
    const said = this.curves.flatMap((c, i) => { // the lower edge of a band is told with the upper one
      if (c.width === 0 && !c.fill) return [];
      const at = nearest(c.points, view.marker), low = c.fill && this.curves[i - 1]?.width === 0 && nearest(this.curves[i - 1].points, view.marker);
      return [[c, at ? `${low ? `${number(low[1])} to ` : ""}${number(at[1])}` : "–", at && at[0] !== view.marker ? ` at ${at[0]}` : ""]];
    });
    this.svg.setAttribute("aria-valuenow", view.marker);
    this.svg.setAttribute("aria-valuetext", `step ${view.marker}: ${said.map(([c, v]) => `${c.name} ${v}`).join(", ")}`);
    if (this.keys.childElementCount !== said.length) this.keys.replaceChildren(...said.map(([c]) => this.key(c)));
    said.forEach(([c, v, where], i) => {
      const key = this.keys.children[i];
      key.setAttribute("aria-pressed", !this.hidden.has(c.key));
      key.lastChild.textContent = v + where;
    });
  }

  key(curve) {
    const flip = () => { this.hidden.has(curve.key) ? this.hidden.delete(curve.key) : this.hidden.add(curve.key); this.draw(); };
    return el("button", { type: "button", class: "key", title: `${curve.key}: show or hide`, onclick: flip },
      el("i", { class: `swatch k-${curve.colour} ${curve.dash || ""}${curve.fill ? " band" : ""}` }), `${curve.name} `, el("b", {}));
  }
}

// Share right over entropy, a dot a step, and the law through the last of them.
class LawChart extends Chart {
  draw() {
    if (!this.curves.length) return;
    this.width = Math.max(260, this.svg.clientWidth || this.node.clientWidth - 40);
    const last = (key) => this.run.metrics.values[key]?.at(-1) ?? NaN, a = last("law/a"), b = last("law/b");
    this.law = a > 0 ? (h) => b - a * Math.exp(h) : null;
    const points = this.curves[0].points.filter(([s]) => s >= view.first && s <= view.last), around = (list) => {
      const [low, high] = [Math.min(...list), Math.max(...list)], more = (high - low) / 20 || 0.05;
      return [low - more, high + more];
    };
    const [left, right] = around(points.map((p) => p[2])), [low, high] = around(points.map((p) => p[1]));
    this.x = (h) => edge.left + (h - left) / (right - left) * (this.width - edge.left - edge.right);
    this.y = (r) => edge.height - edge.bottom - (r - low) / (high - low) * (edge.height - edge.top - edge.bottom);
    const path = (list) => list.map(([, r, h]) => `${this.x(h).toFixed(1)} ${this.y(r).toFixed(1)}`), part = Math.ceil(points.length / 5);
    const dots = [1, 2, 3, 4, 5].map((k) => el("svg:path", { class: "dots k-teal", opacity: 0.25 + 0.15 * k, d: path(points.slice((k - 1) * part, k * part)).map((p) => `M${p}h0`).join("") }));
    const over = Array.from({ length: 41 }, (_, i) => left + (right - left) * i / 40);
    this.line = el("svg:path", { class: "dots here" });
    this.frame(ticks(low, high, 5), this.y, ticks(left, right, this.width / 90), [dots,
      this.law ? el("svg:path", { class: "line k-orange", d: `M${path(over.map((h) => [0, this.law(h), h])).join("L")}` }) : null]);
  }

  at(event) {
    const box = this.svg.getBoundingClientRect(), far = ([, r, h]) => Math.hypot(this.x(h) - event.clientX + box.left, this.y(r) - event.clientY + box.top);
    return this.curves[0].points.reduce((best, p) => (far(p) < far(best) ? p : best))[0];
  }

  mark() {
    if (!this.curves.length || !this.line) return;
    const [step, right, entropy] = nearest(this.curves[0].points, view.marker);
    const said = `step ${step}: entropy ${number(entropy)} nats, share right ${number(right)}${this.law ? `, by the law ${number(this.law(entropy))}` : ""}`;
    this.line.setAttribute("d", `M${this.x(entropy).toFixed(1)} ${this.y(right).toFixed(1)}h0`);
    this.keys.replaceChildren(said, this.law ? "" : el("br"), this.law ? "" : this.run.law);
    this.svg.setAttribute("aria-valuenow", step);
    this.svg.setAttribute("aria-valuetext", said);
  }
}

function nearest(list, step) {
  let found = null;
  for (const p of list) if (!found || Math.abs(p[0] - step) < Math.abs(found[0] - step)) found = p;
  return found;
}

const happened = new Set(["start", "control", "trained", "evaluation"]);
const eventSteps = (run) => [...new Set(run.events.filter((e) => !happened.has(e.kind)).map((e) => e.at))].filter((s) => s >= view.first && s <= view.last);

// Events without a step get that of the time at which they were written, by the seconds of the steps.
function placeEvents(run) {
  const { steps, values } = run.metrics, seconds = values["seconds/step"] || [];
  let since = null, at = steps.find((s) => s > 0) ?? 0;
  for (const event of run.events) {
    const time = Date.parse(event.time);
    if (event.kind === "start") since = { time, i: Math.max(0, steps.findIndex((s) => s >= at)) };
    if (event.step !== null) at = event.step;
    else if (since && !Number.isNaN(time)) {
      let left = (time - since.time) / 1000, i = since.i;
      while (i < steps.length - 1 && left > (seconds[i] || 0) * run.metrics.every) left -= (seconds[i++] || 0) * run.metrics.every;
      at = Math.max(at, steps[i] ?? 0);
    }
    event.at = at;
  }
}

function mark(step) {
  const steps = view.run.metrics.steps;
  view.marker = steps.reduce((best, s) => (Math.abs(s - step) < Math.abs(best - step) ? s : best), steps[0]);
  view.charts.forEach((chart) => chart.mark());
  view.listeners.forEach((tell) => tell());
}

function moveMarker(by) {
  const steps = view.run.metrics.steps, at = steps.indexOf(view.marker);
  mark(steps[Math.min(steps.length - 1, Math.max(0, at + by))]);
}

function zoom(first, last) {
  const steps = view.run.metrics.steps, whole = [steps[0], Math.max(steps.at(-1), steps[0] + 1)];
  view.first = Math.max(whole[0], Math.floor(first ?? whole[0]));
  view.last = Math.min(whole[1], Math.max(Math.ceil(last ?? whole[1]), view.first + 1));
  view.charts.forEach((chart) => chart.draw());
  view.listeners.forEach((tell) => tell());
}

function zoomBy(factor) {
  const half = Math.max(1, (view.last - view.first) * factor / 2);
  zoom(view.marker - half, view.marker + half);
}

function curvesSection(run) {
  const steps = run.metrics.steps, title = el("h2", { id: "curves-title" }, "Curves");
  Object.assign(view, { run, charts: [], listeners: [], grid: null });
  if (!steps.length) return [title, el("p", { class: "missing" }, run.starting ? "No step is done yet." : "Nothing from metrics.jsonl: there are no curves.")];
  view.marker = steps.at(-1);
  placeEvents(run);
  view.grid = el("div", { class: "cards" });
  view.sets = el("div", {});
  const slider = el("input", { type: "range", min: 0, step: 1, oninput: () => mark(view.run.metrics.steps[slider.value]) });
  const where = el("output", {}), here = el("p", { class: "note here" });
  const bound = (name) => el("input", { type: "number", onchange: () => zoom(Number(first.value), Number(last.value)), "aria-label": name });
  const first = bound("first step shown"), last = bound("last step shown");
  const names = el("datalist", { id: "metrics" });
  view.bounds = () => {
    const { steps, values } = view.run.metrics;
    slider.max = steps.length - 1;
    for (const each of [first, last]) [each.min, each.max] = [steps[0], steps.at(-1)];
    names.replaceChildren(...Object.keys(values).map((value) => el("option", { value })));
    view.sets.replaceChildren(...setsTable(view.run));
  };
  view.bounds();
  plotsOf(run).forEach(addChart);
  const more = el("input", { list: "metrics", placeholder: "any metric", onchange: () => {
    const key = more.value.trim();
    more.setCustomValidity(!key || view.run.metrics.values[key] ? "" : `No metric of this run is called ${key}: the list has them all.`);
    if (!more.reportValidity() || !key) return;
    const chart = addChart({ title: key, unit: "", meaning: "Added by you; its definition is in the catalogue of metrics.", free: true, curves: [{ key, name: "value", colour: "indigo" }] });
    more.value = "";
    zoom(view.first, view.last);
    chart.node.scrollIntoView({ block: "nearest" });
  } });
  const step = () => view.run.recorded.reduce((best, s) => (Math.abs(s - view.marker) < Math.abs(best - view.marker) ? s : best), view.run.recorded[0]);
  const open = button("", () => { document.getElementById("tokens").scrollIntoView(); openStep(step()); });
  view.listeners.push(() => {
    open.textContent = `Tokens of step ${step()}`;
    open.hidden = !view.run.recorded.length;
    slider.value = view.run.metrics.steps.indexOf(view.marker);
    where.textContent = view.marker;
    first.value = view.first;
    last.value = view.last;
    const near = view.run.events.filter((e) => e.at === view.marker && !["start", "control"].includes(e.kind)).map((e) => e.kind);
    here.textContent = near.length ? `At step ${view.marker}: ${[...new Set(near)].join(", ")}.` : "";
  });
  const bar = el("div", { class: "bar" }, button("◀", () => moveMarker(-1), { "aria-label": "previous step" }),
    el("label", { class: "field grow" }, el("span", {}, "Step ", where), slider), button("▶", () => moveMarker(1), { "aria-label": "next step" }),
    el("span", { class: "field" }, el("span", {}, "Shown"), el("span", {}, first, " to ", last)), button("All steps", () => zoom()),
    open,
    el("label", { class: "field" }, el("span", {}, "Add a curve"), more), names);
  const every = run.metrics.every > 1 ? ` Each point is the mean of ${run.metrics.every} steps.` : "";
  return [title, el("p", { class: "note" }, `Point at a curve for its values; drag across to zoom, double-click for all. Dashed lines are events.${every}`), bar, here, view.grid, view.sets];
}

function addChart(plot) {
  const chart = new (plot.law ? LawChart : Chart)(view.run, plot);
  view.charts.push(chart);
  view.grid.append(chart.node);
  return chart;
}

// A later state of the run: marker and zoom stay, unless they were at its end.
function followCurves(run) {
  const [was] = view.run.metrics.steps, end = view.run.metrics.steps.at(-1);
  const last = view.marker === end, whole = view.first <= was && view.last >= end;
  view.run = run;
  placeEvents(run);
  const plots = new Map(plotsOf(run).map((plot) => [plot.title, plot]));
  for (const chart of view.charts) {
    chart.feed(run, plots.get(chart.plot.title) || chart.plot);
    plots.delete(chart.plot.title);
  }
  plots.forEach(addChart);
  view.bounds();
  mark(last ? run.metrics.steps.at(-1) : view.marker);
  whole ? zoom() : zoom(view.first, view.last);
}
