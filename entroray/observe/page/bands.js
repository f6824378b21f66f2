// Runs that differ only in their seed are one band: how they are told, and what is drawn of them.

const WEARS = ["indigo", "orange", "teal", "red", "purple", "cyan", "pink", "green"], DASHES = ["", "dashed", "dot"];
const NEUTRAL = ["seed", "run.dir", "run.name", "run.resume", "run.dry", "run.trace", "run.grace", "observe.", "checkpoint."];
const LABELLED = 3, DRAWS = 2000;

const counts = (list) => list.reduce((found, each) => found.set(each, (found.get(each) || 0) + 1), new Map());
const mean = (list) => list.reduce((sum, v) => sum + v, 0) / list.length;
const plain = (json) => (json === undefined ? "none" : json.startsWith('"') ? JSON.parse(json) : Number.isNaN(Number(json)) ? json : String(Number(Number(json).toPrecision(6))));
const counted = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;

// Settings that are not the same in all runs whose settings are known; those of NEUTRAL change no number of a run.
function differing(about) {
  const known = about.filter((a) => a.settings.length).map((a) => new Map(a.settings));
  const names = new Set(known.flatMap((settings) => [...settings.keys()]).filter((n) => !NEUTRAL.some((each) => n.startsWith(each))));
  return [...names].filter((name) => new Set(known.map((settings) => settings.get(name))).size > 1);
}

// Bands of runs by what differs in their settings. A copy of a run is no other seed: it is drawn apart.
function bandsOf(about, apart) {
  const names = differing(about), found = new Map(), seen = new Map();
  about.forEach((a, i) => {
    const settings = new Map(a.settings), own = settings.size ? names.map((n) => settings.get(n) ?? "") : [a.name];
    const again = JSON.stringify([own, settings.get("seed")]), copy = seen.get(again) || 0;
    seen.set(again, copy + 1);
    const key = JSON.stringify([own, apart ? i : copy]);
    if (!found.has(key)) found.set(key, { name: label(a, names), runs: [] });
    found.get(key).runs.push(i);
  });
  const bands = [...found.values()], same = counts(bands.map((b) => b.name));
  const which = ([first, ...more]) => `${about[first].name}${more.length ? ` and ${more.length} more` : ""}`;
  for (const band of bands) if (same.get(band.name) > 1) band.name += ` (${which(band.runs)})`;
  return bands;
}

function label(a, names) {
  if (!a.settings.length) return a.name;
  const settings = new Map(a.settings), others = names.filter((n) => !n.startsWith("objective.")).map((n) => `${n}=${plain(settings.get(n))}`);
  return [a.objective, ...others.slice(0, LABELLED), others.length > LABELLED ? "…" : ""].join(" ").trim();
}

// Each value the mean of the last `window` that were measured.
const smoothed = (points, window) => points.map(([x], i) => [x, mean(points.slice(Math.max(0, i + 1 - window), i + 1).map((p) => p[1]))]);

function measured(metrics, key, window) {
  const values = metrics.values[key] || [];
  return smoothed(metrics.steps.map((s, i) => [s, values[i]]).filter(([, v]) => v !== null && v !== undefined), window);
}

// Which of n values each draw takes, the same every time.
const picks = new Map();
function drawsOf(n) {
  if (!picks.has(n)) {
    let state = 1;
    picks.set(n, Uint16Array.from({ length: DRAWS * n }, () => {
      state = (state + 0x6d2b79f5) | 0;
      let t = Math.imul(state ^ (state >>> 15), 1 | state);
      t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
      return ((t ^ (t >>> 14)) >>> 0) / 4294967296 * n;
    }));
  }
  return picks.get(n);
}

// 95 % percentile bootstrap interval of the mean; of 2 or 3 values that is their range.
function interval(values) {
  const n = values.length;
  if (n < 4) return [Math.min(...values), Math.max(...values)];
  const picked = drawsOf(n), means = new Float64Array(DRAWS);
  for (let d = 0; d < DRAWS; d++) {
    for (let i = 0; i < n; i++) means[d] += values[picked[d * n + i]];
    means[d] /= n;
  }
  means.sort();
  return [0.025, 0.975].map((share) => {
    const at = share * (DRAWS - 1), low = Math.floor(at);
    return means[low] + (at - low) * (means[Math.min(low + 1, DRAWS - 1)] - means[low]);
  });
}

// What is drawn of band `i`: one run is a line; several are their mean and its interval over the steps that
// all of them have, and a thin line each elsewhere.
function curvesOfBand(band, i, runs, key, window) {
  const lists = band.runs.map((run) => measured(runs[run], key, window)).filter((list) => list.length);
  const known = lists.map((list) => new Map(list)), base = { key: `band ${i}`, band: i, name: band.name, known, ...wear(i),
    steps: [...new Set(lists.flat().map(([s]) => s))].sort((a, b) => a - b), said: new Map() };
  if (lists.length < 2) return lists.map((points) => ({ ...base, points }));
  const shared = lists[0].map(([s]) => s).filter((s) => known.every((each) => each.has(s)));
  const at = shared.map((s) => known.map((each) => each.get(s))), within = at.map(interval), all = new Set(shared);
  const line = (points, more) => (points.length ? [{ ...base, ...more, points }] : []);
  const ends = (list) => list.filter(([s], k) => !all.has(s) || (list[k + 1] && !all.has(list[k + 1][0])));
  return [
    ...line(shared.map((s, k) => [s, within[k][0]]), { width: 0 }), ...line(shared.map((s, k) => [s, within[k][1]]), { width: 0, fill: true }),
    ...line(shared.map((s, k) => [s, mean(at[k])])),
    ...lists.flatMap((list) => (all.size < list.length ? line(ends(list), { width: 1.5, thin: true }) : [])),
  ];
}

const wear = (i) => ({ colour: WEARS[i % WEARS.length], dash: DASHES[Math.floor(i / WEARS.length) % DASHES.length] });

// What a band measured at the step nearest to `step`: of all its runs the mean and its interval, else of those that have it.
function saidAt(curve, step) {
  const at = nearest(curve.steps.map((s) => [s]), step)[0];
  if (!curve.said.has(at)) {
    const values = curve.known.map((each) => each.get(at)).filter((v) => v !== undefined), n = curve.known.length, y = mean(values);
    const beside = n === 1 ? "" : values.length < n ? ` (${values.length} of ${n})` : ` [${interval(values).map((v) => number(v)).join(", ")}]`;
    curve.said.set(at, { at, y, text: number(y) + beside });
  }
  return curve.said.get(at);
}
