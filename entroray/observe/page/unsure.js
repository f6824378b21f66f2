// What the policy was unsure of: forking tokens early and late, and a step's least sure tokens.

const LEAST_SURE = 20, FEW = 5;
const oneCell = (text) => visible(text).replace(/\n/g, "");

// Token i between those around it.
function inContext(block, i, around) {
  const r = block.rolloutOf(i), text = (from, to) => {
    let found = "";
    for (let k = Math.max(r.start, from); k < Math.min(r.stop, to); k++) found += block.text(k) ?? "";
    return oneCell(found);
  };
  const [first, after] = block.cell(i);
  return [first - around > r.start ? "…" : "", text(first - around, first), el("mark", {}, oneCell(block.text(first) ?? "")), text(after, after + around), after + around < r.stop ? "…" : ""];
}

function forksSection(run) {
  const none = el("p", { class: "missing" }, "Nothing from tokens/: no entropy was recorded.");
  const body = el("div", {}, run.recorded.length ? el("p", { class: "note" }, "Counted as soon as this part is in sight.") : none);
  look.forks = body;
  look.drawForks = async () => {
    const parts = [], { run } = look;
    for (const step of new Set([run.recorded[0], run.recorded.at(-1)])) {
      const block = look.block?.step === step ? look.block : await readStep(step);
      if (typeof block === "string") continue;
      const when = run.recorded.length < 2 ? "" : step === run.recorded[0] ? "Early: " : "Late: ";
      parts.push(...forksOf(block, when));
    }
    body.replaceChildren(...(parts.length ? parts : [none]));
    look.forked = true;
  };
  const seen = new IntersectionObserver((entries) => {
    if (!entries.some((e) => e.isIntersecting)) return;
    seen.disconnect();
    look.drawForks();
  });
  if (run.recorded.length) seen.observe(body);
  return [el("h2", { id: "forks-title" }, "Forking tokens"), el("p", { class: "note" }, "The tokens most often drawn in the upper fifth of a step's entropy (arXiv 2506.01939), and the share of these draws that the update learns from."), body];
}

function forksOf(block, when) {
  const counted = [], found = new Map();
  for (let i = 0; i < block.tokens; i++) if (Number.isFinite(block.number("entropy", i)) && block.mask(i) === null) counted.push(i);
  if (!counted.length) return [];
  const sorted = Float64Array.from(counted, (i) => block.number("entropy", i)).sort();
  const above = sorted[Math.ceil(0.8 * (sorted.length - 1))];
  for (const i of counted) {
    const h = block.number("entropy", i);
    if (h <= above) continue;
    const [id] = block.words[block.number("word", i)], token = found.get(id) || { count: 0, entropy: 0, learnt: 0, at: [] };
    found.set(id, token);
    token.count++;
    token.entropy += h;
    token.learnt += block.learnt(i);
    token.at.push(i);
  }
  const most = [...found.values()].sort((a, b) => b.count - a.count).slice(0, 12);
  const example = (i) => {
    const r = block.rolloutOf(i), place = i - r.start;
    return el("button", { type: "button", class: "example text", title: `rollout ${r.rollout}, token ${place}: show`, onclick: () => openStep(block.step, r.rollout, place) }, inContext(block, i, 12));
  };
  const rows = most.map((t) => [el("code", { class: "text" }, oneCell(block.text(t.at[0]) ?? "")), String(t.count), number(t.entropy / t.count, 3), share(t.learnt / t.count),
    el("span", {}, [...new Set([t.at[0], t.at.at(-1)])].map(example))]);
  return [el("h3", {}, `${when}step ${block.step}, above ${number(above, 3)} nats`), table(["token", "times", "mean entropy, nats", "learnt from", "examples"], rows, `forking tokens of step ${block.step}`)];
}

// The places of highest entropy, each between what stands around it; siblings with the same text before it share a place.
function drawSure() {
  const block = look.block;
  let best = [];
  for (let i = 0; block.has("entropy") && i < block.tokens; i++) {
    const h = block.number("entropy", i);
    if (!Number.isFinite(h) || block.mask(i) !== null || (best.length === LEAST_SURE && h <= best.at(-1).h)) continue;
    if (!block.rolloutOf(i)) continue;
    const known = best.findIndex((b) => samePlace(b.i, i));
    if (known >= 0 && best[known].h >= h) continue;
    if (known >= 0) best.splice(known, 1);
    best = [...best, { h, i }].sort((a, b) => b.h - a.h).slice(0, LEAST_SURE);
  }
  look.sure = best.map(({ i }) => block.cell(i)[0]);
  const rows = best.map(({ h, i }) => {
    const r = block.rolloutOf(i), there = block.rollouts.filter((each) => each.group === r.group).filter((each) => each.start + i - r.start < each.stop)
      .map((each) => each.start + i - r.start).filter((k) => block.mask(k) === null && samePlace(k, i));
    const learnt = there.filter((k) => block.learnt(k)).length;
    return [number(h, 3), el("span", { class: "text" }, inContext(block, i, 12)), there.length > 1 ? `${learnt} of ${there.length} siblings` : learnt ? "yes" : "no",
      number(Math.exp(block.number("logprob_old", i)), 3), number(block.number("advantage", i), 3),
      button(`rollout ${r.rollout}, ${r.correct ? "right" : "wrong"}`, () => goTo(i), { class: "link", title: `show token ${i - r.start}` })];
  });
  const list = el("div", {}), draw = (most) => list.replaceChildren(table(["entropy, nats", "in context", "learnt from", "probability", "advantage", ""], rows.slice(0, most), "least sure tokens"),
    ...(rows.length > most ? [button(`All ${rows.length}`, () => draw(rows.length))] : []));
  draw(FEW);
  look.parts.sure.replaceChildren(el("h3", {}, `Tokens that the policy was least sure of at step ${block.step} `, el("small", {}, "siblings with the same text before it share a line, which shows one of them; the key u goes to the next")),
    rows.length ? list : el("p", { class: "missing" }, "Nothing from tokens/: no entropy was recorded."));
}

// Whether tokens a and b are of one group and have the same tokens before them.
function samePlace(a, b) {
  const block = look.block, r = block.rolloutOf(a), s = block.rolloutOf(b);
  if (r?.group !== s?.group || a - r.start !== b - s.start) return false;
  let k = 1;
  while (k <= a - r.start && block.number("word", a - k) === block.number("word", b - k)) k++;
  return k > a - r.start;
}
