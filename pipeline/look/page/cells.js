// The map of the open sample as it is now: colours, legend, the cell that is pointed at, and the keys inside the map.

function paintDetail() {
  if (!opened) return;
  const { sample, view, facts, cells } = opened;
  const classes = classesShown(view);
  const colours = coloursOf(sample, view);
  const w = DATA.grid[1];
  const bright = ([r, g, b]) => 0.299 * r + 0.587 * g + 0.114 * b > 140;
  cells.forEach((cell, i) => {
    const slot = slotOf(facts, classes[i]);
    const edge = state.over === "classes" || state.over === "student";
    cell.style.backgroundColor = `rgb(${colours[i].join(" ")} / ${state.opacity}%)`;
    cell.classList.toggle("right-edge", edge && (i + 1) % w !== 0 && classes[i + 1] !== classes[i]);
    cell.classList.toggle("low-edge", edge && i + w < CELLS && classes[i + w] !== classes[i]);
    cell.classList.toggle("dark", bright(colours[i]) && state.opacity > 55);
    cell.textContent = edge
      ? letter(slot)
      : state.over === "margin"
        ? facts.margins[i].toFixed(2).replace(/^0/, "")
        : view.entropy[i].toFixed(1);
    cell.dataset.class = classes[i];
    cell.setAttribute(
      "aria-label",
      `row ${Math.floor(i / w) + 1}, column ${(i % w) + 1}: ${nameOf(classes[i])}` +
        (state.over === "margin" ? `, margin ${facts.margins[i].toFixed(3)}` : ""),
    );
  });
  for (const button of $("detail").querySelectorAll("[data-over]")) {
    button.setAttribute("aria-pressed", button.dataset.over === state.over ? "true" : "false");
  }
  $("detail")
    .querySelector(".scale")
    .replaceChildren(...(SCALES[state.over] ? [SCALES[state.over][0], make("i"), SCALES[state.over][1]] : []));
  const x = (200 * state.step) / DATA.steps;
  opened.story.head.setAttribute("x1", x);
  opened.story.head.setAttribute("x2", x);
  paintLegend(classes);
  paintReadout(classes);
  opened.command.textContent = `${sample.command} --view ${view.v}${DATA.cells ? ` --blend ${+share(blendNow()).toFixed(6)}` : ""} --png sample.png`;
}

function paintLegend(classes) {
  const { sample, view, facts, legend } = opened;
  const counts = new Map();
  for (const c of classes) counts.set(c, (counts.get(c) || 0) + 1);
  const roles = (c) =>
    [
      c === view.teacher && "teacher's class of the image",
      c === sample.label && "label",
      view.partner && c === view.partner.label && "partner's label",
    ]
      .filter(Boolean)
      .join(", ");
  const listed = [...facts.slots].filter(([, slot]) => slot !== OTHER).sort((a, b) => a[1] - b[1]);
  const rest = classes.filter((c) => slotOf(facts, c) === OTHER).length;
  const others = [...facts.slots.values()].filter((slot) => slot === OTHER).length;
  legend.replaceChildren(
    ...listed.map(([c, slot]) =>
      make(
        "li",
        { class: counts.get(c) ? "" : "none" },
        make("i", { vars: { "--c": css(COLOURS[slot]) } }, letter(slot)),
        make("span", { class: "grow" }, fullName(c), make("small", {}, roles(c))),
        make("b", {}, `${counts.get(c) || 0}`),
      ),
    ),
    ...(others
      ? [
          make(
            "li",
            { class: rest ? "" : "none" },
            make("i", { vars: { "--c": css(COLOURS[OTHER]) } }),
            make("span", { class: "grow" }, `${counted(others, "other class").replace("classs", "classes")}`),
            make("b", {}, `${rest}`),
          ),
        ]
      : []),
  );
}

function point(cell) {
  pointed = cell;
  opened.cells.forEach((one, i) => one.classList.toggle("at", i === cell));
  if (cell !== null) opened.cells.forEach((one, i) => one.setAttribute("tabindex", i === cell ? "0" : "-1"));
  paintReadout(classesShown(opened.view));
}

function paintReadout(classes) {
  const { view, facts, readout } = opened;
  if (pointed === null) {
    const same = classes.filter((c) => c === view.teacher).length;
    const kinds = new Set(classes).size;
    if (state.over === "student") {
      const text = view.said
        ? make(
            "p",
            {},
            "The student says what the cell is taught at this step in ",
            make("b", {}, percent(agreementAt(view, blendNow()), 0)),
            ` of ${counted(CELLS, "cell")}; ${kinds} ${kinds === 1 ? "class" : "classes"} in all.`,
          )
        : make("p", {}, "Without the view there is nothing that the student could see.");
      readout.replaceChildren(text);
      return;
    }
    readout.replaceChildren(
      make(
        "p",
        {},
        make("b", {}, `${same} of ${CELLS} cells`),
        ` are taught the image's class, ${nameOf(view.teacher)}; ` +
          `${kinds} ${kinds === 1 ? "class" : "classes"} in all.`,
      ),
      make("p", { class: "hint" }, "Point at a cell, or tap it, for its targets over all of training."),
    );
    return;
  }
  const w = DATA.grid[1];
  const margin = facts.margins[pointed];
  const soft = view.entropy ? `; entropy ${view.entropy[pointed].toFixed(2)} nats` : "";
  const keeps =
    margin >= 1
      ? "is taught the image's class at every blend"
      : `keeps the image's class up to blend ${margin.toFixed(3)}`;
  const found = runsOf(view, pointed);
  const at = (x) => percent(x / DATA.steps, 0);
  const words = found.map(([c, from, to], i) =>
    found.length === 1
      ? `${nameOf(c)} all the time`
      : i === found.length - 1
        ? `${nameOf(c)} from ${at(from)} of training on`
        : `${nameOf(c)} to ${at(to)}`,
  );
  const runs = found.map(([c, from, to]) =>
    make(
      "span",
      {
        title: nameOf(c),
        vars: {
          "--from": from / (DATA.steps + 1),
          "--to": to / (DATA.steps + 1),
          "--c": css(COLOURS[slotOf(facts, c)]),
        },
      },
      letter(slotOf(facts, c)),
    ),
  );
  readout.replaceChildren(
    make(
      "p",
      {},
      make("b", {}, `${state.over === "student" && view.said ? "The student says " : ""}${nameOf(classes[pointed])}`),
      ` in row ${Math.floor(pointed / w) + 1}, column ${(pointed % w) + 1}; ${keeps}${soft}`,
    ),
    make(
      "div",
      { class: "runs", "aria-hidden": "true" },
      ...runs,
      make("i", { vars: { "--at": state.step / DATA.steps } }),
    ),
    make("small", {}, `Taught ${words.join(", ")}.`),
  );
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
