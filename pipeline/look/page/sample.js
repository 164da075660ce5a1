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
  const cells = view.n.map((_, cell) =>
    make("span", {
      role: "gridcell",
      class: "cell",
      tabindex: cell ? "-1" : "0",
      on: { pointerenter: () => point(cell), focus: () => point(cell), pointerdown: () => point(cell) },
    }),
  );
  const [h, w] = DATA.grid;
  const rows = [...Array(h)].map((_, i) =>
    make("span", { role: "row", class: "row" }, ...cells.slice(i * w, (i + 1) * w)),
  );
  const grid = make(
    "span",
    {
      role: "grid",
      class: `cells${w > 16 ? " fine" : ""}`,
      "aria-label": `Targets of ${h} by ${w} cells; arrow keys go from cell to cell`,
      vars: { "--w": w, "--h": h },
      on: { keydown: walk, pointerleave: () => point(null) },
    },
    ...rows,
  );
  opened = { sample, view, facts, cells };
  opened.legend = make("ul", { class: "legend", "aria-label": "Classes of this view" });
  opened.readout = make("div", { class: "readout" });
  opened.story = story();
  opened.command = make("code");
  const copy = make(
    "button",
    { type: "button", on: { click: () => copyText(copy, opened.command.textContent) } },
    "Copy",
  );

  $("detail").replaceChildren(
    make(
      "div",
      { class: "bar" },
      make(
        "button",
        { type: "button", class: "close", "aria-label": "Back to all samples", on: { click: close } },
        "✕",
      ),
      make(
        "div",
        { class: "grow" },
        make(
          "h3",
          {},
          nameOf(sample.label),
          make(
            "span",
            { class: `verdict ${ok ? "ok" : "no"}` },
            ok ? " ✓ teacher is right" : ` ✗ teacher says ${nameOf(view.teacher)}`,
          ),
        ),
        make("p", { class: "key" }, sample.key),
      ),
      make(
        "button",
        { type: "button", "aria-label": "Sample before", title: "Sample before (←)", on: { click: () => step(-1) } },
        "←",
      ),
      make(
        "button",
        { type: "button", "aria-label": "Sample after", title: "Sample after (→)", on: { click: () => step(1) } },
        "→",
      ),
    ),
    make(
      "div",
      { class: "views", role: "group", "aria-label": "Views" },
      ...sample.views.map((v) =>
        make(
          "button",
          {
            type: "button",
            class: v === view ? "on" : "",
            "aria-pressed": v === view ? "true" : "false",
            on: {
              click: () => {
                open(sample, v, false);
                $("detail").querySelector(".views .on").focus();
              },
            },
          },
          `view ${v.v}`,
          make("small", {}, v.mode === "unmixed" ? "" : ` ${v.mode}`),
        ),
      ),
    ),
    make(
      "div",
      { class: "stage" },
      make(
        "figure",
        { class: "big" },
        make("div", { class: "frame" }, picture(view, `View ${view.v} of ${sample.key}, as the teacher saw it`), grid),
        overlayTools(),
      ),
      make("div", { class: "side" }, original(sample, view), seen(sample, view)),
    ),
    opened.readout,
    opened.story.figure,
    opened.legend,
    make("dl", { class: "facts" }, ...viewFacts(sample, view)),
    make("div", { class: "command" }, opened.command, copy),
  );
  paintDetail();
}

const SCALES = {
  // what both ends of the colours mean
  margin: ["0: leaves the image's class at once", "1: never"],
  entropy: ["0 nats: sure", `${Math.log(DATA.classes).toFixed(1)}: knows nothing`],
};

function overlayTools() {
  const choose = (key) => {
    state.over = key;
    writeHash();
    paint();
  };
  const kinds = make(
    "div",
    { class: "kinds", role: "group", "aria-label": "Drawn over the image" },
    ...Object.entries(OVERLAYS).map(([key, text]) =>
      make("button", { type: "button", "data-over": key, on: { click: () => choose(key) } }, text),
    ),
  );
  const opacity = make("input", {
    type: "range",
    min: 0,
    max: 100,
    step: 5,
    value: state.opacity,
    "aria-label": "Opacity of what is drawn over the image",
    on: {
      input: (event) => {
        state.opacity = +event.target.value;
        writeHash();
        paint();
      },
    },
  });
  return make(
    "figcaption",
    {},
    kinds,
    make("label", { class: "opacity" }, "Opacity ", opacity),
    make("span", { class: "scale" }),
  );
}

function original(sample, view) {
  const frame = make("div", { class: "frame" }, picture(sample, `The image ${sample.key}, not augmented`));
  if (sample.size) {
    // The viewBox is the image, so that shares of it are places in the picture.
    frame.classList.add("loose");
    frame.style.setProperty("--ratio", sample.size[0] / sample.size[1]);
    if (view.crop) {
      const [y, x, high, wide] = view.crop.map((v) => 100 * v);
      frame.append(
        make(
          "svg",
          { viewBox: "0 0 100 100", preserveAspectRatio: "none", "aria-hidden": "true" },
          make("rect", { x, y, width: wide, height: high, class: "crop" }),
        ),
      );
    }
  }
  const size = sample.size ? `${sample.size[0]} × ${sample.size[1]}, the frame is the crop` : sample.error;
  return make("figure", {}, frame, make("figcaption", {}, make("b", {}, "Original "), size));
}

function seen(sample, view) {
  const frame = make("div", { class: "frame" }, picture(view, `View ${view.v}, as the teacher saw it`));
  if (view.box && view.src) {
    const [top, bottom, left, right_] = view.box.map((v) => (100 * v) / DATA.about.size);
    frame.append(
      make(
        "svg",
        { viewBox: "0 0 100 100", "aria-hidden": "true" },
        make("rect", { x: left, y: top, width: right_ - left, height: bottom - top, class: "box" }),
      ),
    );
  }
  const text = view.src ? (view.box ? "the dashed box is the partner's" : "replayed from its seed") : "";
  return make("figure", {}, frame, make("figcaption", {}, make("b", {}, "What the teacher saw "), text));
}

function viewFacts(sample, view) {
  const rows = [["Label", fullName(sample.label)]];
  if (view.partner) {
    const bar = make("span", {
      class: "shares",
      role: "img",
      "aria-label": `own share ${percent(view.share)}`,
      vars: { "--own": `${100 * view.share}%` },
    });
    rows.push([
      "Mixed with",
      make(
        "span",
        { class: "mate" },
        view.partner.src ? picture(view.partner, "") : "",
        make("span", {}, `${fullName(view.partner.label)}`, make("small", {}, view.partner.key)),
      ),
    ]);
    const box = view.box ? `; box rows ${view.box[0]}–${view.box[1]}, columns ${view.box[2]}–${view.box[3]}` : "";
    rows.push([
      "By",
      make(
        "span",
        {},
        `${view.mode}, own share λ = ${view.share.toFixed(4)} (${number(view.lam)} / 65,536)${box}`,
        bar,
      ),
    ]);
  } else rows.push(["Mixed with", "nothing"]);
  rows.push([
    "Augmentation",
    view.words
      ? make("span", { class: "chips" }, ...view.words.map((w) => make("span", {}, w)))
      : "not known without the image",
  ]);
  rows.push([
    "Replay",
    view.src
      ? make("span", { class: "ok" }, `✓ digest ${view.digest}: the pixels and the mixing the teacher saw`)
      : make("span", { class: "no" }, `✗ ${view.error}`),
  ]);
  if (view.said) {
    const shares = [DATA.one, DATA.one / 2, 0].map((blend) => percent(agreementAt(view, blend), 0));
    rows.push(["Student", `says the class of the target in ${shares.join(" / ")} of the cells at blends 1 / 0.5 / 0`]);
  }
  rows.push(["Seed", make("code", {}, view.seed)]);
  rows.push([
    "Cells",
    `mean margin ${view.margin.toFixed(3)}; ${percent(view.differ, 0)} of the cells are not of the most frequent class`,
  ]);
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
    paths.push(
      make("path", { d: `M${edge(above).join("L")}L${edge(below).reverse().join("L")}Z`, fill: css(COLOURS[slot]) }),
    );
    below = above;
  }
  const head = make("line", { y1: 0, y2: 100, class: "head" });
  const svg = make(
    "svg",
    { viewBox: "0 0 200 100", preserveAspectRatio: "none", "aria-hidden": "true" },
    ...paths,
    head,
  );
  const away = [0, Math.round(last / 2), last].map((at) => CELLS - counts[at][0]);
  const figure = make(
    "figure",
    {
      class: "story",
      title: "Click to go there",
      on: {
        click: (event) => {
          const box = svg.getBoundingClientRect();
          setStep(Math.round((DATA.steps * (event.clientX - box.left)) / box.width));
        },
      },
    },
    svg,
    make(
      "figcaption",
      {},
      `Cells by what they are taught over training, ${state.decay} decay: ` +
        `${away[0]} of ${CELLS} differ from the image's class at the start, ${away[1]} half-way, ${away[2]} at the end.`,
    ),
  );
  return { figure, head };
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
    setTimeout(() => {
      button.textContent = "Copy";
    }, 1500);
  };
  if (navigator.clipboard)
    navigator.clipboard.writeText(text).then(
      () => done("Copied"),
      () => done("Select it"),
    );
  else done("Select it");
}
