// The filters and the cards.

const right = (view) => view.meant === view.teacher;
const inMatrix = new Set(DATA.figures.matrix.classes);
const bucket = (c) => (inMatrix.has(c) ? c : -1);

function passes(sample, view) {
  const partner = view.partner ? view.partner.label : -1;
  if (state.class && ![sample.label, partner, view.teacher].includes(+state.class)) return false;
  if (state.teacher && right(view) !== (state.teacher === "right")) return false;
  if (state.mix === "mixed" ? view.mode === "unmixed" : state.mix && view.mode !== state.mix) return false;
  if (state.pair && state.pair !== `${bucket(view.meant)}:${bucket(view.teacher)}`) return false;
  if (state.text) {
    const texts = [sample.key, ...[sample.label, view.teacher, ...(view.partner ? [partner] : [])].map(fullName)];
    if (!texts.some((text) => text.toLowerCase().includes(state.text.toLowerCase()))) return false;
  }
  return true;
}

const ORDERS = {
  certain: (a, b) => b.view.margin - a.view.margin,
  uncertain: (a, b) => a.view.margin - b.view.margin,
  differ: (a, b) => b.view.differ - a.view.differ,
};

// Samples with a view that passes, each in the best such view, in the chosen order.
function matches() {
  const compare = ORDERS[state.order];
  const found = [];
  for (const sample of DATA.samples) {
    let views = sample.views.filter((view) => passes(sample, view)).map((view) => ({ sample, view }));
    if (compare) views = views.sort(compare);
    if (views.length) found.push(views[0]);
  }
  return compare ? found.sort(compare) : found;
}

let cards = []; // of the gallery: { sample, view, button, canvas }

function drawGallery() {
  const all = matches();
  const chosen = current();
  cards = all.map(({ sample, view }) => card(sample, chosen.sample === sample ? chosen.view : view));
  $("gallery").replaceChildren(...cards.map((one) => one.item));
  if (!cards.length) {
    $("gallery").append(
      make("p", { class: "empty" }, "No sample matches. Clear a filter, or draw more samples with --samples."),
    );
  }
  const views = all.length ? DATA.samples.reduce((n, s) => n + s.views.filter((v) => passes(s, v)).length, 0) : 0;
  $("count").textContent =
    `${counted(all.length, "sample")} of ${number(DATA.samples.length)}, ${counted(views, "view")}`;
  markCurrent();
  paintCards();
}

function card(sample, view) {
  const canvas = make("canvas", { width: DATA.grid[1], height: DATA.grid[0], "aria-hidden": "true" });
  const button = make("button", { type: "button", class: "card", on: { click: () => open(sample, view, true) } });
  const one = { sample, view, button, canvas, item: make("div", { role: "listitem" }, button) };
  fillCard(one);
  return one;
}

function fillCard(one) {
  const { sample, view, button, canvas } = one;
  const ok = right(view);
  const mixed = view.mode === "unmixed" ? "" : ` mixed with ${nameOf(view.partner.label)} by ${view.mode}`;
  button.setAttribute(
    "aria-label",
    `${nameOf(sample.label)}, ${sample.key}, view ${view.v}${mixed}; the teacher says ${nameOf(view.teacher)}: ${ok ? "right" : "wrong"}`,
  );
  const tag =
    view.mode === "unmixed" ? null : make("span", { class: "tag" }, `${view.mode} ${view.share.toFixed(2)}`);
  button.replaceChildren(
    make("span", { class: "thumb" }, picture(view, ""), canvas, tag),
    make("span", { class: "name" }, nameOf(sample.label)),
    make("span", { class: `verdict ${ok ? "ok" : "no"}` }, ok ? "✓ " : "✗ ", nameOf(view.teacher)),
    make(
      "span",
      { class: "dots", "aria-hidden": "true" },
      ...sample.views.map((v) => make("i", { class: v === view ? "on" : "" })),
    ),
  );
}

// A picture, or in its place that there is none.
function picture(holder, alt) {
  if (holder.src) {
    const small = holder.size ? Math.max(...holder.size) <= 64 : DATA.about.size <= 64;
    return make("img", { src: holder.src, alt, class: small ? "small" : "", decoding: "async", draggable: "false" });
  }
  return make(
    "span",
    { class: "nothing", role: alt ? "img" : null, "aria-label": alt ? `${alt}: not there` : null },
    "no picture",
  );
}

function paintCards() {
  for (const { sample, view, canvas } of cards) paintCanvas(canvas, coloursOf(sample, view));
}

function paintCanvas(canvas, colours) {
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(canvas.width, canvas.height);
  const alpha = Math.round(2.55 * state.opacity);
  colours.forEach(([r, g, b], cell) => pixels.data.set([r, g, b, alpha], 4 * cell));
  context.putImageData(pixels, 0, 0);
}

// The sample and view that are open; where the address names none, the first that matches.
function current() {
  const sample = DATA.samples.find((s) => String(s.i) === state.sample);
  if (!sample) return matches()[0] || { sample: DATA.samples[0], view: DATA.samples[0].views[0] };
  const view =
    sample.views.find((v) => String(v.v) === state.view) ||
    sample.views.find((v) => passes(sample, v)) ||
    sample.views[0];
  return { sample, view };
}

function markCurrent() {
  const { sample, view } = current();
  for (const one of cards) {
    const on = one.sample === sample;
    if (on && one.view !== view) {
      one.view = view;
      fillCard(one);
    }
    one.button.classList.toggle("on", on);
    one.button.setAttribute("aria-current", on ? "true" : "false");
  }
}

function fillFilters() {
  const counts = new Map();
  for (const sample of DATA.samples) {
    const classes = new Set([
      sample.label,
      ...sample.views.flatMap((v) => [v.teacher, ...(v.partner ? [v.partner.label] : [])]),
    ]);
    for (const c of classes) counts.set(c, (counts.get(c) || 0) + 1);
  }
  const options = [...counts].sort((a, b) => nameOf(a[0]).localeCompare(nameOf(b[0])));
  $("f-class").replaceChildren(
    make("option", { value: "" }, "any class"),
    ...options.map(([c, n]) => make("option", { value: c }, `${nameOf(c)} (${n})`)),
  );
}

function showFilters() {
  for (const [id, key] of Object.entries({
    "f-class": "class",
    "f-right": "teacher",
    "f-mix": "mix",
    "f-order": "order",
    "f-text": "text",
  })) {
    if ($(id).value !== state[key]) $(id).value = state[key];
    $(id).classList.toggle("set", state[key] !== "");
  }
  $("f-pair").hidden = !state.pair;
  if (state.pair) {
    const [label, found] = state.pair.split(":").map(Number);
    $("f-pair").textContent = `${nameOf(label)} taken for ${nameOf(found)} ✕`;
    $("f-pair").setAttribute("aria-label", `Remove the filter: ${nameOf(label)} taken for ${nameOf(found)}`);
  }
  $("f-clear").disabled = !["class", "teacher", "mix", "order", "text", "pair"].some((key) => state[key]);
}

function setFilter(key, value) {
  state[key] = value;
  const found = matches();
  const open = found.find(({ sample }) => String(sample.i) === state.sample);
  if (state.sample && !open && found.length)
    Object.assign(state, { sample: String(found[0].sample.i), view: String(found[0].view.v) });
  else if (open && !passes(open.sample, current().view)) state.view = String(open.view.v);
  writeHash();
  showFilters();
  drawGallery();
  drawDetail();
  markMatrix();
}
