// One sample: what the teacher saw, what each cell is taught now and over all of training, how the view was made.

let opened = null; // { sample, view, facts, cells: [elements], ... }
let pointed = null; // the cell under the pointer or with the focus

function open(sample, view, show) {
  state.sample = String(sample.i);
  state.view = String(view.v);
  writeHash();
  drawDetail();
  markCurrent();
  if (show) {
    document.body.classList.add("showing");
    if (matchMedia("(max-width: 900px)").matches) $("detail").focus();
  }
}

function close() {
  document.body.classList.remove("showing");
  const one = cards.find(({ sample }) => String(sample.i) === state.sample);
  if (one) one.button.focus();
}

function drawDetail() {
  const { sample, view } = current();
  const facts = about(sample, view);
  pointed = null;
  const ok = right(view);
  const cells = view.n.map((_, cell) => make("span", {
    role: "gridcell", class: "cell", tabindex: cell ? "-1" : "0",
    on: { pointerenter: () => point(cell), focus: () => point(cell), pointerdown: () => point(cell) },
  }));
  const [h, w] = DATA.grid;
  const rows = [...Array(h)].map((_, i) => make("span", { role: "row", class: "row" }, ...cells.slice(i * w, (i + 1) * w)));
  const grid = make("span", {
    role: "grid", class: `cells${w > 16 ? " fine" : ""}`, "aria-label": `Targets of ${h} by ${w} cells; arrow keys go from cell to cell`,
    vars: { "--w": w, "--h": h }, on: { keydown: walk, pointerleave: () => point(null) },
  }, ...rows);
  opened = { sample, view, facts, cells };
  opened.legend = make("ul", { class: "legend", "aria-label": "Classes of this view" });
  opened.readout = make("div", { class: "readout" });
  opened.story = story();
  opened.command = make("code");
  const copy = make("button", { type: "button", on: { click: () => copyText(copy, opened.command.textContent) } }, "Copy");

  $("detail").replaceChildren(
    make("div", { class: "bar" },
      make("button", { type: "button", class: "close", "aria-label": "Back to all samples", on: { click: close } }, "✕"),
      make("div", { class: "grow" },
        make("h3", {}, nameOf(sample.label), make("span", { class: `verdict ${ok ? "ok" : "no"}` },
          ok ? " ✓ teacher is right" : ` ✗ teacher says ${nameOf(view.teacher)}`)),
        make("p", { class: "key" }, sample.key)),
      make("button", { type: "button", "aria-label": "Sample before", title: "Sample before (←)", on: { click: () => step(-1) } }, "←"),
      make("button", { type: "button", "aria-label": "Sample after", title: "Sample after (→)", on: { click: () => step(1) } }, "→")),
    make("div", { class: "views", role: "group", "aria-label": "Views" }, ...sample.views.map((v) => make("button", {
      type: "button", class: v === view ? "on" : "", "aria-pressed": v === view ? "true" : "false",
      on: { click: () => { open(sample, v, false); $("detail").querySelector(".views .on").focus(); } },
    }, `view ${v.v}`, make("small", {}, v.mode === "unmixed" ? "" : ` ${v.mode}`)))),
    make("div", { class: "stage" },
      make("figure", { class: "big" },
        make("div", { class: "frame" }, picture(view, `View ${view.v} of ${sample.key}, as the teacher saw it`), grid),
        overlayTools()),
      make("div", { class: "side" }, original(sample, view), seen(sample, view))),
    opened.readout, opened.story.figure, opened.legend,
    make("dl", { class: "facts" }, ...viewFacts(sample, view)),
    make("div", { class: "command" }, opened.command, copy),
  );
  paintDetail();
}

const SCALES = { // what both ends of the colours mean
  margin: ["0: leaves the image's class at once", "1: never"], entropy: ["0 nats: sure", `${Math.log(DATA.classes).toFixed(1)}: knows nothing`],
};

function overlayTools() {
  const choose = (key) => { state.over = key; writeHash(); paint(); };
  const kinds = make("div", { class: "kinds", role: "group", "aria-label": "Drawn over the image" },
    ...Object.entries(OVERLAYS).map(([key, text]) => make("button", { type: "button", "data-over": key, on: { click: () => choose(key) } }, text)));
  const opacity = make("input", {
    type: "range", min: 0, max: 100, step: 5, value: state.opacity, "aria-label": "Opacity of what is drawn over the image",
    on: { input: (event) => { state.opacity = +event.target.value; writeHash(); paint(); } },
  });
  return make("figcaption", {}, kinds, make("label", { class: "opacity" }, "Opacity ", opacity), make("span", { class: "scale" }));
}

function original(sample, view) {
  const frame = make("div", { class: "frame" }, picture(sample, `The image ${sample.key}, not augmented`));
  if (sample.size) {
    // The viewBox is the image, so that shares of it are places in the picture.
    frame.classList.add("loose");
    frame.style.setProperty("--ratio", sample.size[0] / sample.size[1]);
    if (view.crop) {
      const [y, x, high, wide] = view.crop.map((v) => 100 * v);
      frame.append(make("svg", { viewBox: "0 0 100 100", preserveAspectRatio: "none", "aria-hidden": "true" },
        make("rect", { x, y, width: wide, height: high, class: "crop" })));
    }
  }
  const size = sample.size ? `${sample.size[0]} × ${sample.size[1]}, the frame is the crop` : sample.error;
  return make("figure", {}, frame, make("figcaption", {}, make("b", {}, "Original "), size));
}

function seen(sample, view) {
  const frame = make("div", { class: "frame" }, picture(view, `View ${view.v}, as the teacher saw it`));
  if (view.box && view.src) {
    const [top, bottom, left, right_] = view.box.map((v) => (100 * v) / DATA.about.size);
    frame.append(make("svg", { viewBox: "0 0 100 100", "aria-hidden": "true" },
      make("rect", { x: left, y: top, width: right_ - left, height: bottom - top, class: "box" })));
  }
  const text = view.src ? (view.box ? "the dashed box is the partner's" : "replayed from its seed") : "";
  return make("figure", {}, frame, make("figcaption", {}, make("b", {}, "What the teacher saw "), text));
}

function viewFacts(sample, view) {
  const rows = [["Label", fullName(sample.label)]];
  if (view.partner) {
    const bar = make("span", { class: "shares", role: "img", "aria-label": `own share ${percent(view.share)}`, vars: { "--own": `${100 * view.share}%` } });
    rows.push(["Mixed with", make("span", { class: "mate" }, view.partner.src ? picture(view.partner, "") : "",
      make("span", {}, `${fullName(view.partner.label)}`, make("small", {}, view.partner.key)))]);
    const box = view.box ? `; box rows ${view.box[0]}–${view.box[1]}, columns ${view.box[2]}–${view.box[3]}` : "";
    rows.push(["By", make("span", {}, `${view.mode}, own share λ = ${view.share.toFixed(4)} (${number(view.lam)} / 65,536)${box}`, bar)]);
  } else rows.push(["Mixed with", "nothing"]);
  rows.push(["Augmentation", view.words ? make("span", { class: "chips" }, ...view.words.map((w) => make("span", {}, w)))
    : "not known without the image"]);
  rows.push(["Replay", view.src ? make("span", { class: "ok" }, `✓ digest ${view.digest}: the pixels and the mixing the teacher saw`)
    : make("span", { class: "no" }, `✗ ${view.error}`)]);
  rows.push(["Seed", make("code", {}, view.seed)]);
  rows.push(["Cells", `mean margin ${view.margin.toFixed(3)}; ${percent(view.differ, 0)} of the cells are not of the most frequent class`]);
  return rows.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]);
}

// Share of cells of each class over all of training, the chosen decay's, with the slider's place in it.
function story() {
  const { sample, view } = opened;
  const counts = storyOf(sample, view);
  const last = counts.length - 1;
  const paths = [];
  let below = new Array(counts.length).fill(0);
  for (let slot = 0; slot < COLOURS.length; slot++) {
    if (!counts.some((at) => at[slot])) continue;
    const above = below.map((y, step_) => y + counts[step_][slot]);
    const edge = (ys) => ys.map((y, x) => `${((200 * x) / last).toFixed(1)},${(100 - (100 * y) / CELLS).toFixed(2)}`);
    paths.push(make("path", { d: `M${edge(above).join("L")}L${edge(below).reverse().join("L")}Z`, fill: css(COLOURS[slot]) }));
    below = above;
  }
  const head = make("line", { y1: 0, y2: 100, class: "head" });
  const svg = make("svg", { viewBox: "0 0 200 100", preserveAspectRatio: "none", "aria-hidden": "true" }, ...paths, head);
  const away = [0, Math.round(last / 2), last].map((at) => CELLS - counts[at][0]);
  const figure = make("figure", {
    class: "story", title: "Click to go there",
    on: { click: (event) => {
      const box = svg.getBoundingClientRect();
      setStep(Math.round((DATA.steps * (event.clientX - box.left)) / box.width));
    } },
  }, svg, make("figcaption", {}, `Cells by what they are taught over training, ${state.decay} decay: `
    + `${away[0]} of ${CELLS} differ from the image's class at the start, ${away[1]} half-way, ${away[2]} at the end.`));
  return { figure, head };
}

function paintDetail() {
  if (!opened) return;
  const { sample, view, facts, cells } = opened;
  const classes = classesAt(view, blendNow());
  const colours = coloursOf(sample, view);
  const w = DATA.grid[1];
  const bright = ([r, g, b]) => 0.299 * r + 0.587 * g + 0.114 * b > 140;
  cells.forEach((cell, i) => {
    const slot = slotOf(facts, classes[i]);
    const edge = state.over === "classes";
    cell.style.backgroundColor = `rgb(${colours[i].join(" ")} / ${state.opacity}%)`;
    cell.classList.toggle("right-edge", edge && (i + 1) % w !== 0 && classes[i + 1] !== classes[i]);
    cell.classList.toggle("low-edge", edge && i + w < CELLS && classes[i + w] !== classes[i]);
    cell.classList.toggle("dark", bright(colours[i]) && state.opacity > 55);
    cell.textContent = edge ? letter(slot) : state.over === "margin" ? facts.margins[i].toFixed(2).replace(/^0/, "") : view.entropy[i].toFixed(1);
    cell.dataset.class = classes[i];
    cell.setAttribute("aria-label", `row ${Math.floor(i / w) + 1}, column ${(i % w) + 1}: ${nameOf(classes[i])}`
      + (state.over === "margin" ? `, margin ${facts.margins[i].toFixed(3)}` : ""));
  });
  for (const button of $("detail").querySelectorAll("[data-over]")) {
    button.setAttribute("aria-pressed", button.dataset.over === state.over ? "true" : "false");
  }
  $("detail").querySelector(".scale").replaceChildren(...(SCALES[state.over] ? [SCALES[state.over][0], make("i"), SCALES[state.over][1]] : []));
  const x = (200 * state.step) / DATA.steps;
  opened.story.head.setAttribute("x1", x);
  opened.story.head.setAttribute("x2", x);
  paintLegend(classes);
  paintReadout(classes);
  opened.command.textContent = `${sample.command} --view ${view.v} --blend ${+share(blendNow()).toFixed(6)} --png sample.png`;
}

function paintLegend(classes) {
  const { sample, view, facts, legend } = opened;
  const counts = new Map();
  for (const c of classes) counts.set(c, (counts.get(c) || 0) + 1);
  const roles = (c) => [
    c === view.teacher && "teacher's class of the image", c === sample.label && "label",
    view.partner && c === view.partner.label && "partner's label",
  ].filter(Boolean).join(", ");
  const listed = [...facts.slots].filter(([, slot]) => slot !== OTHER).sort((a, b) => a[1] - b[1]);
  const rest = classes.filter((c) => slotOf(facts, c) === OTHER).length;
  const others = [...facts.slots.values()].filter((slot) => slot === OTHER).length;
  legend.replaceChildren(
    ...listed.map(([c, slot]) => make("li", { class: counts.get(c) ? "" : "none" },
      make("i", { vars: { "--c": css(COLOURS[slot]) } }, letter(slot)), make("span", { class: "grow" }, fullName(c), make("small", {}, roles(c))),
      make("b", {}, `${counts.get(c) || 0}`))),
    ...(others ? [make("li", { class: rest ? "" : "none" }, make("i", { vars: { "--c": css(COLOURS[OTHER]) } }),
      make("span", { class: "grow" }, `${counted(others, "other class").replace("classs", "classes")}`), make("b", {}, `${rest}`))] : []),
  );
}

function point(cell) {
  pointed = cell;
  opened.cells.forEach((one, i) => one.classList.toggle("at", i === cell));
  if (cell !== null) opened.cells.forEach((one, i) => one.setAttribute("tabindex", i === cell ? "0" : "-1"));
  paintReadout(classesAt(opened.view, blendNow()));
}

function paintReadout(classes) {
  const { view, facts, readout } = opened;
  if (pointed === null) {
    const same = classes.filter((c) => c === view.teacher).length;
    const kinds = new Set(classes).size;
    readout.replaceChildren(make("p", {}, make("b", {}, `${same} of ${CELLS} cells`), ` are taught the image's class, ${nameOf(view.teacher)}; `
      + `${kinds} ${kinds === 1 ? "class" : "classes"} in all.`), make("p", { class: "hint" }, "Point at a cell, or tap it, for its targets over all of training."));
    return;
  }
  const w = DATA.grid[1];
  const margin = facts.margins[pointed];
  const soft = view.entropy ? `; entropy ${view.entropy[pointed].toFixed(2)} nats` : "";
  const keeps = margin >= 1 ? "is taught the image's class at every blend"
    : `keeps the image's class up to blend ${margin.toFixed(3)}`;
  const found = runsOf(view, pointed);
  const at = (x) => percent(x / DATA.steps, 0);
  const words = found.map(([c, from, to], i) => (found.length === 1 ? `${nameOf(c)} all the time`
    : i === found.length - 1 ? `${nameOf(c)} from ${at(from)} of training on` : `${nameOf(c)} to ${at(to)}`));
  const runs = found.map(([c, from, to]) => make("span", {
    title: nameOf(c), vars: { "--from": from / (DATA.steps + 1), "--to": to / (DATA.steps + 1), "--c": css(COLOURS[slotOf(facts, c)]) },
  }, letter(slotOf(facts, c))));
  readout.replaceChildren(
    make("p", {}, make("b", {}, nameOf(classes[pointed])), ` in row ${Math.floor(pointed / w) + 1}, column ${(pointed % w) + 1}; ${keeps}${soft}`),
    make("div", { class: "runs", "aria-hidden": "true" }, ...runs, make("i", { vars: { "--at": state.step / DATA.steps } })),
    make("small", {}, `Taught ${words.join(", ")}.`));
}

// Arrow keys inside the map.
function walk(event) {
  const [h, w] = DATA.grid;
  const at = opened.cells.indexOf(event.target);
  const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
  if (event.key === "Escape") $("detail").focus();
  else if (event.key in moves) {
    const row = Math.floor(at / w) + moves[event.key][0];
    const column = (at % w) + moves[event.key][1];
    if (row >= 0 && row < h && column >= 0 && column < w) opened.cells[row * w + column].focus();
  } else return;
  event.preventDefault();
  event.stopPropagation();
}

function step(by) {
  const { sample } = current();
  const at = cards.findIndex((one) => one.sample === sample);
  const next = cards[Math.min(Math.max(at + by, 0), cards.length - 1)];
  if (!next || next.sample === sample) return;
  open(next.sample, next.view, false);
  if (!document.body.classList.contains("showing") || !matchMedia("(max-width: 900px)").matches) {
    next.button.scrollIntoView({ block: "nearest" });
  }
}

function stepView(by) {
  const { sample, view } = current();
  const next = sample.views[sample.views.indexOf(view) + by];
  if (next) open(sample, next, false);
}

function copyText(button, text) {
  const done = (said) => {
    button.textContent = said;
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  };
  if (navigator.clipboard) navigator.clipboard.writeText(text).then(() => done("Copied"), () => done("Select it"));
  else done("Select it");
}
