"use strict";
// Small parts that every section uses: elements, numbers in words, and where data come from.

function el(tag, attributes = {}, ...children) {
  const node = tag.startsWith("svg:")
    ? document.createElementNS("http://www.w3.org/2000/svg", tag.slice(4))
    : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== undefined && value !== null) node.setAttribute(name, value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return node;
}

// Where the page's data come from: the page itself. A server puts its own object here.
const source = window.entroraySource || {
  run: async () => JSON.parse(document.getElementById("run").textContent),
  step: async (step) => {
    const text = atob(document.getElementById(`step-${step}`).textContent);
    const bytes = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
    return bytes;
  },
};

function number(value, digits = 4) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e5) return Math.round(value).toLocaleString("en");
  if (size < 1e-4) return value.toExponential(2).replace(/\.?0+e/, "e").replaceAll("-", "−");
  return String(Number(value.toPrecision(digits))).replace("-", "−");
}

const share = (value) => `${number(100 * value, 3)} %`;

// Invisible and control characters by name, so that no text moves or hides another.
function visible(text) {
  return text
    .replace(/[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ue000-\uf8ff]/g,
      (c) => `⟨U+${c.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`)
    .replace(/[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/g, "�")
    .replace(/\t/g, "⇥\t")
    .replace(/\n/g, "⏎\n");
}

const oneLine = (text, most) => {
  const line = visible(text).replace(/\s+/g, " ").trim();
  return line.length > most ? `${line.slice(0, most - 1)}…` : line;
};

function table(head, rows, caption) {
  return el("div", { class: "wide", tabindex: 0, role: "region", "aria-label": caption },
    el("table", {}, el("thead", {}, el("tr", {}, head.map((cell) => el("th", { scope: "col" }, cell)))),
      el("tbody", {}, rows.map((row) => el("tr", {}, row.map((cell, i) => el("td", { "data-name": head[i] || null }, cell)))))));
}

function choice(label, options, chosen, change) {
  const select = el("select", { "aria-label": label, onchange: () => change(select.value) },
    options.map(([value, text]) => el("option", { value, selected: String(value) === String(chosen) }, text)));
  return el("span", { class: "field" }, el("span", { "aria-hidden": "true" }, label), select);
}

const button = (text, press, more = {}) => el("button", { type: "button", onclick: press, ...more }, text);
