// What the policy was unsure of: forking tokens early and late, and a step's least sure tokens.

const LEAST_SURE = 20;
const oneCell = (text) => visible(text).replace(/\n/g, "");

// Token i between those around it.
function inContext(block, i, around) {
  const r = block.rolloutOf(i), text = (from, to) => {
    let found = "";
    for (let k = Math.max(r.start, from); k < Math.min(r.stop, to); k++) found += block.text(k) ?? "";
    return oneCell(found);
  };
  const [first, after] = block.cell(i);
  return [text(first - around, first), el("mark", {}, oneCell(block.text(first) ?? "")), text(after, after + around)];
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

// The tokens of highest entropy that count, each between those around it.
function drawSure() {
  const block = look.block;
  let best = [];
  for (let i = 0; block.has("entropy") && i < block.tokens; i++) {
    const h = block.number("entropy", i);
    if (!Number.isFinite(h) || block.mask(i) !== null || (best.length === LEAST_SURE && h <= best.at(-1)[0])) continue;
    best.push([h, i]);
    best.sort((a, b) => b[0] - a[0]);
    best = best.slice(0, LEAST_SURE);
  }
  look.sure = best.map(([, i]) => i);
  const rows = look.sure.map((i) => [number(block.number("entropy", i), 3), number(Math.exp(block.number("logprob_old", i)), 3), number(block.number("advantage", i), 3),
    block.learnt(i) ? "yes" : "no", el("span", { class: "text" }, inContext(block, i, 12)),
    button("show", () => goTo(i), { class: "link", "aria-label": `show token ${i - block.rolloutOf(i).start} of rollout ${block.rolloutOf(i).rollout}` })]);
  look.parts.sure.replaceChildren(el("h3", {}, `Tokens that the policy was least sure of at step ${block.step}`),
    rows.length ? table(["entropy", "probability", "advantage", "learnt from", "in context", ""], rows, "least sure tokens") : el("p", { class: "missing" }, "Nothing from tokens/: no entropy was recorded."));
}
