"use strict";
// Data of the page, small helpers, and its state, all of which stands in the URL's hash.

const DATA = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);

// An element; texts become text nodes, never markup.
function make(tag, props = {}, ...children) {
  const svg = ["svg", "path", "rect", "line", "text", "g", "title"].includes(tag);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [key, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (key === "on") for (const [type, listener] of Object.entries(value)) element.addEventListener(type, listener);
    else if (key === "vars") for (const [name, v] of Object.entries(value)) element.style.setProperty(name, v);
    else if (key === "class") element.setAttribute("class", value);
    else element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

const nameOf = (c) => (c < 0 ? "any other class" : (DATA.names[c] || [`class ${c}`])[0]);
const fullName = (c) => {
  const [word, name] = DATA.names[c] || [`class ${c}`, `class ${c}`];
  return word === name ? word : `${word} (${name})`;
};
const number = (x) => x.toLocaleString("en-US");
const percent = (x, digits = 1) => `${(100 * x).toFixed(digits)} %`;
const bytes = (n) =>
  n >= 1e9
    ? `${(n / 1e9).toFixed(2)} GB`
    : n >= 1e6
      ? `${(n / 1e6).toFixed(1)} MB`
      : n >= 1e4
        ? `${(n / 1e3).toFixed(1)} kB`
        : `${number(Math.round(n))} bytes`;
const counted = (n, noun) => `${number(n)} ${noun}${n === 1 ? "" : "s"}`;

// Key in the hash -> value at the start. A value of the start does not stand in the hash.
const DEFAULTS = {
  class: "",
  teacher: "",
  mix: "",
  order: "",
  text: "",
  pair: "",
  sample: "",
  view: "",
  decay: DATA.about.decay,
  step: 0,
  over: "classes",
  opacity: 50,
  theme: "",
};
const state = { ...DEFAULTS };
const OVERLAYS = {
  classes: "Classes",
  margin: "Margin",
  ...(DATA.soft ? { entropy: "Entropy" } : {}),
  ...(DATA.student ? { student: "Student" } : {}),
};

// What a stranger's address may hold: anything else is left as it was at the start.
const ALLOWED = {
  class: (x) => /^\d+$/.test(x),
  teacher: (x) => ["right", "wrong"].includes(x),
  mix: (x) => ["mixed", "unmixed", "mixup", "cutmix"].includes(x),
  order: (x) => ["certain", "uncertain", "differ"].includes(x),
  text: (x) => x.length < 200,
  pair: (x) => /^-?\d+:-?\d+$/.test(x),
  sample: (x) => /^\d+$/.test(x),
  view: (x) => /^\d+$/.test(x),
  decay: (x) => x in DATA.blends,
  step: (x) => /^\d+$/.test(x) && +x <= DATA.steps,
  over: (x) => x in OVERLAYS,
  opacity: (x) => /^\d+$/.test(x) && +x <= 100,
  theme: (x) => ["light", "dark"].includes(x),
};

function readHash() {
  Object.assign(state, DEFAULTS);
  for (const [key, value] of new URLSearchParams(location.hash.slice(1))) {
    if (key in ALLOWED && ALLOWED[key](value)) state[key] = typeof DEFAULTS[key] === "number" ? +value : value;
  }
}

let writing = 0;
function writeHash() {
  // Browsers allow a hundred changes in half a minute: the last of a row of changes counts.
  clearTimeout(writing);
  writing = setTimeout(() => {
    const kept = Object.entries(state).filter(([key, value]) => value !== DEFAULTS[key]);
    const text = new URLSearchParams(kept).toString();
    if (text !== location.hash.slice(1)) history.replaceState(null, "", text ? `#${text}` : "#");
  }, 150);
}
