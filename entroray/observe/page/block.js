// A recorded step: its gzip block into columns, and what the columns say of tokens and rollouts.

const SHADES = 12;
const half = new Float32Array(65536);
for (let i = 0; i < 65536; i++) {
  const power = (i >> 10) & 31, part = i & 1023, sign = i & 0x8000 ? -1 : 1;
  half[i] = power === 31 ? (part ? NaN : sign * Infinity) : power ? sign * 2 ** (power - 15) * (1 + part / 1024) : sign * 2 ** -24 * part;
}

async function readBlock(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const buffer = await new Response(stream).arrayBuffer();
  const size = new DataView(buffer).getUint32(0, true);
  const block = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, size)));
  const n = block.tokens, column = {};
  let at = 4 + size;
  for (const about of block.columns) {
    const wide = about.kind === "constant" ? 0 : about.kind === "float" ? 2 : about.wide;
    const values = new (about.kind === "float" ? Float32Array : Float64Array)(wide ? n : 0);
    const planes = Array.from({ length: wide }, (_, i) => new Uint8Array(buffer, at + i * n, n));
    at += wide * n;
    if (about.kind === "float") for (let i = 0; i < n; i++) values[i] = half[planes[0][i] | planes[1][i] << 8] * about.unit;
    else planes.forEach((plane, k) => { for (let i = 0; i < n; i++) values[i] += plane[i] * 256 ** k; });
    if (about.kind === "integer") for (let i = 0; i < n; i++) values[i] = values[i] ? values[i] + about.low : NaN;
    column[about.name] = wide ? (i) => values[i] : () => about.value ?? NaN;
  }
  return new Block(block, column);
}

class Block {
  constructor(block, column) {
    Object.assign(this, block);
    this.column = column;
    const stops = [...this.starts.slice(1), this.tokens];
    const places = new Map(this.rows.map((row, i) => [row, [this.starts[i], stops[i]]]));
    for (const r of this.rollouts) {
      [r.start, r.stop] = places.get(r.rollout) || [0, 0];
      if (typeof r.parts === "string") try { r.parts = JSON.parse(r.parts); } catch { r.parts = { parts: r.parts }; }
    }
    this.groups = [...new Set(this.rollouts.map((r) => r.group))];
    this.range = {};
  }

  has(name) { return name in this.column; }
  number(name, i) { return this.has(name) ? this.column[name](i) : NaN; }
  mask(i) { return this.has("mask_reason") ? this.masks[this.number("mask_reason", i)] ?? null : null; }
  text(i) {
    const [id, text] = this.words[this.number("word", i)];
    return text === "" ? `⟨${id}⟩` : text;
  }
  // Tokens that are one cell with token i: a character can be cut across several.
  cell(i) {
    let first = i, after = i + 1;
    while (first > 0 && this.text(first) === null) first--;
    while (after < this.tokens && this.text(after) === null) after++;
    return [first, after];
  }
  learnt(i) {
    const off = ["selected", "advantage", "scale"].some((name) => this.has(name) && !this.number(name, i));
    return !off && this.mask(i) === null;
  }
  value(name, i) {
    if (name === "lag") return this.has("version") ? this.step - 1 - this.number("version", i) : NaN;
    if (name === "learnt") return this.learnt(i) ? 1 : 0;
    if (name === "weight") return this.learnt(i) ? (this.has("scale") ? this.number("scale", i) : 1) * this.number("advantage", i) : 0;
    return name === "gap" ? Math.abs(this.number("gap", i)) : this.number(name, i);
  }
  // From the lowest value to that which 1 % of the tokens exceed, so that a few do not hide the rest.
  limits(name) {
    if (this.range[name]) return this.range[name];
    const apart = Math.max(1, Math.floor(this.tokens / 50000)), values = [];
    for (let i = 0; i < this.tokens; i += apart) { const v = this.value(name, i); if (Number.isFinite(v)) values.push(v); }
    values.sort((a, b) => a - b);
    const low = ["entropy", "varentropy", "gap", "lag", "learnt"].includes(name) ? 0 : values[0] ?? 0;
    const high = name === "learnt" ? 1 : values[Math.floor(0.99 * (values.length - 1))] ?? low;
    return (this.range[name] = [low, high > low ? high : values.at(-1) > low ? values.at(-1) : low + 1]);
  }
  shade(name, i) {
    const v = this.value(name, i), [low, high] = this.limits(name);
    return Number.isFinite(v) ? Math.min(SHADES - 1, Math.max(0, Math.floor((v - low) / (high - low) * SHADES))) : null;
  }
  response(r) {
    if (typeof r.response === "string") return r.response;
    if (r.joined === undefined) {
      r.joined = "";
      for (let i = r.start; i < r.stop; i++) r.joined += this.text(i) ?? "";
    }
    return r.joined;
  }
  mean(name, r) {
    let sum = 0, count = 0;
    for (let i = r.start; i < r.stop; i++) { const v = this.value(name, i); if (Number.isFinite(v)) { sum += v; count++; } }
    return count ? sum / count : NaN;
  }
  rolloutOf(i) { return this.rollouts.find((r) => r.start <= i && i < r.stop); }
}
