// Colours, confusion matrix and distributions: drawn once, from counts over whole units.

function drawRoles() {
  const texts = [
    "the teacher's class of the whole image",
    "the label, where the teacher says another",
    "the label of the mix partner",
  ];
  $("roles").replaceChildren(
    ...texts.map((text, slot) =>
      make("li", {}, make("i", { vars: { "--c": css(COLOURS[slot]) } }, letter(slot)), text),
    ),
    make(
      "li",
      {},
      ...[3, 4, 5, 6, 7, 8, 9, 10].map((slot) => make("i", { vars: { "--c": css(COLOURS[slot]) } }, letter(slot))),
      "other classes, per view",
    ),
    make("li", {}, make("i", { vars: { "--c": css(COLOURS[OTHER]) } }), "the rest"),
  );
}

function drawMatrix() {
  const { classes, counts } = DATA.figures.matrix;
  const shown = new Map();
  for (const sample of DATA.samples)
    for (const v of sample.views) {
      const key = `${bucket(v.meant)}:${bucket(v.teacher)}`;
      shown.set(key, (shown.get(key) || 0) + 1);
    }
  const found = new Map(counts.map(([label, cls, n]) => [`${label}:${cls}`, n]));
  const axis = counts.some(([label, cls]) => label < 0 || cls < 0) ? [...classes, -1] : classes;
  const rowSum = (label) => axis.reduce((n, cls) => n + (found.get(`${label}:${cls}`) || 0), 0);
  const head = make(
    "tr",
    {},
    make("td", { class: "corner" }, make("span", {}, "label ↓  teacher →")),
    ...axis.map((c) => make("th", { scope: "col", title: nameOf(c) }, make("span", {}, nameOf(c)))),
  );
  const rows = axis.map((label) => {
    const sum = Math.max(1, rowSum(label));
    return make(
      "tr",
      {},
      make("th", { scope: "row", title: nameOf(label) }, nameOf(label)),
      ...axis.map((cls) => {
        const key = `${label}:${cls}`;
        const n = found.get(key) || 0;
        const here = shown.get(key) || 0;
        const text = `label ${nameOf(label)}, teacher ${nameOf(cls)}: ${counted(n, "view")}, ${here} on this page`;
        const heat = n ? 0.12 + 0.88 * Math.sqrt(n / sum) : 0;
        const kind = label !== cls ? "bad" : label < 0 ? "both" : "good";
        const inside = here
          ? make(
              "button",
              {
                type: "button",
                "data-pair": key,
                "aria-pressed": "false",
                "aria-label": text,
                on: {
                  click: () => {
                    setFilter("pair", state.pair === key ? "" : key);
                    if (state.pair) toSection("samples");
                  },
                },
              },
              short(n),
            )
          : n
            ? short(n)
            : "";
        return make(
          "td",
          { class: n ? `${kind}${heat > 0.6 ? " hot" : ""}` : "", title: text, vars: { "--heat": heat.toFixed(3) } },
          inside,
        );
      }),
    );
  });
  const cell = Math.round(Math.min(52, Math.max(32, 640 / axis.length)));
  $("matrix").replaceChildren(
    make(
      "table",
      { class: "matrix", vars: { "--cell": `${cell}px` } },
      make("caption", {}, "Views by label and by the teacher's class"),
      make("thead", {}, head),
      make("tbody", {}, ...rows),
    ),
  );
  const most = DATA.figures.mistakes.length ? DATA.figures.mistakes[0][2] : 1;
  $("mistakes").replaceChildren(
    ...DATA.figures.mistakes.map(([label, cls, n]) => {
      const key = `${label}:${cls}`;
      const here = inMatrix.has(label) && inMatrix.has(cls) ? shown.get(key) || 0 : 0;
      return make(
        "button",
        {
          type: "button",
          class: "row",
          "data-pair": key,
          "aria-pressed": "false",
          disabled: !here,
          title: `${counted(n, "view")}, ${here} on this page`,
          on: {
            click: () => {
              setFilter("pair", key);
              toSection("samples");
            },
          },
        },
        make("span", { class: "name" }, `${nameOf(label)} → ${nameOf(cls)}`),
        make("span", { class: "lane" }, make("i", { class: "fill", vars: { "--v": n / most, "--c": "#d55e00" } })),
        make("span", { class: "value" }, number(n)),
      );
    }),
  );
  $("confusion-note").textContent =
    `${counted(DATA.figures.views, "view")} of ${counted(DATA.figures.units, "unit")}. ` +
    "A mixed view counts for the label that the teacher names, if that is one of its two, else for the one with the larger share. " +
    "A framed cell has views on this page: press it to see them." +
    (axis.includes(-1)
      ? ` Of ${number(DATA.classes)} classes these ${classes.length} are shown, mistakes with pictures first.`
      : "");
}

const short = (n) =>
  n < 1000 ? String(n) : n < 1e6 ? `${(n / 1000).toFixed(n < 1e4 ? 1 : 0)}k` : `${(n / 1e6).toFixed(1)}M`;

function markMatrix() {
  for (const button of $("confusion").querySelectorAll("[data-pair]")) {
    button.setAttribute("aria-pressed", button.dataset.pair === state.pair ? "true" : "false");
  }
}

// A chart of horizontal or vertical bars, with its numbers as a table for those who don't see it.
function chart(title, note, body, table, kind = "") {
  return make(
    "figure",
    { class: `panel ${kind}` },
    make("h3", {}, title),
    make("p", { class: "note" }, note),
    body,
    make(
      "details",
      { class: "numbers" },
      make("summary", {}, "Numbers"),
      make(
        "div",
        { class: "scroll" },
        make(
          "table",
          {},
          make("thead", {}, make("tr", {}, ...table[0].map((cell) => make("th", {}, cell)))),
          make(
            "tbody",
            {},
            ...table.slice(1).map((row) => make("tr", {}, ...row.map((cell) => make("td", {}, String(cell))))),
          ),
        ),
      ),
    ),
  );
}

// Bars of values; what is above `most` is cut there, and its share written on it.
function columns(values, labels, tips, colour = "var(--accent)", most = Math.max(...values, 1), total = 1) {
  return make(
    "div",
    { class: "columns-chart", "aria-hidden": "true" },
    ...values.map((value, i) =>
      make(
        "div",
        { class: "col", title: tips[i] },
        value > most ? make("span", { class: "cut" }, percent(value / total, 0)) : null,
        make("span", {
          class: "fill",
          vars: {
            "--v": Math.min(1, value / most) * (value > most ? 0.9 : 1),
            "--c": typeof colour === "function" ? colour(i) : colour,
          },
        }),
        make("span", { class: "tick" }, labels[i]),
      ),
    ),
  );
}

function drawCharts() {
  const { segments, margins, agreement, views, units, blends } = DATA.figures;
  $("figures-note").textContent =
    `From ${counted(views, "view")} of ${counted(units, "unit")}, ${number(DATA.figures.mixed)} of them mixed.`;
  const cells = segments.reduce((n, [, count]) => n + count, 0) || 1;
  const mean = segments.reduce((n, [k, count]) => n + k * count, 0) / cells;
  const shown =
    segments.length > 12
      ? [...segments.slice(0, 11), [`${segments[11][0]}+`, segments.slice(11).reduce((n, s) => n + s[1], 0)]]
      : segments;
  const never = margins[margins.length - 1];
  const bins = margins.length - 1;
  const span = (i) => (i === bins ? "never leaves" : `${(i / bins).toFixed(2)} to ${((i + 1) / bins).toFixed(2)}`);
  const ofCells = [
    chart(
      "Classes that a cell is taught over training",
      `Segments of its envelope, ${mean.toFixed(2)} on average: 1 means that the cell agrees with the image at every blend.`,
      columns(
        shown.map((s) => s[1]),
        shown.map((s) => String(s[0])),
        shown.map((s) => `${s[0]}: ${percent(s[1] / cells)} of the cells`),
      ),
      [["segments", "cells", "share"], ...segments.map(([k, n]) => [k, number(n), percent(n / cells, 2)])],
    ),
    chart(
      "Margins",
      `Blend up to which a cell keeps the image's class. ${percent(never / cells)} of the cells never leave it; those that leave at a small blend differ for most of training.`,
      columns(
        margins,
        margins.map((_, i) => (i === bins ? "∞" : i % 5 ? "" : (i / bins).toFixed(2).replace(/0$/, ""))),
        margins.map((n, i) => `${span(i)}: ${percent(n / cells)} of the cells`),
        (i) => css(ramp(i / bins)),
        Math.max(1, ...margins.slice(0, bins)) * 1.1,
        cells,
      ),
      [["margin", "cells", "share"], ...margins.map((n, i) => [span(i), number(n), percent(n / cells, 2)])],
    ),
  ];
  const figures = [
    ...(DATA.cells ? ofCells : []),
    bytesChart(),
    agreementChart(agreement, blends),
    ...(DATA.student && DATA.student.by_epoch.length ? [studentChart(DATA.student.by_epoch)] : []),
  ];
  $("charts").replaceChildren(...figures);
}

// What training logged, or what the kept weights say, epoch by epoch.
function studentChart(rows) {
  const logged = rows.some((row) => row.trained !== null);
  const values = rows.map((row) => (logged ? row.trained : row.shown) || 0);
  const every = Math.ceil(rows.length / 12);
  const said = (x) => (x === null ? "–" : percent(x));
  return chart(
    "Agreement of the student, by epoch",
    logged
      ? "Share of the cells of which it says the target of that epoch, over all views of the epoch."
      : "Share of the cells of which its weights after that epoch say the target, on the views that were compared.",
    columns(
      values,
      rows.map((row, i) => (i % every ? "" : String(row.epoch))),
      rows.map((row, i) => `epoch ${row.epoch}: ${percent(values[i])}`),
      "var(--accent)",
      Math.max(...values, 0.01) * 1.05,
    ),
    [["epoch", "in training", "compared views"], ...rows.map((row) => [row.epoch, said(row.trained), said(row.shown)])],
  );
}

function agreementChart(agreement, blends) {
  const rows = agreement.map((row) =>
    make(
      "button",
      {
        type: "button",
        class: "row",
        title: `${fullName(row.c)}: ${blends.map((b, k) => `${percent(row.shares[k])} at blend ${b}`).join(", ")}; ${counted(row.n, "view")}`,
        disabled: !$("f-class").querySelector(`option[value="${row.c}"]`),
        on: {
          click: () => {
            setFilter("class", String(row.c));
            toSection("samples");
          },
        },
      },
      make("span", { class: "name" }, nameOf(row.c)),
      make(
        "span",
        { class: "lane" },
        make("i", { class: "fill", vars: { "--v": row.shares[0] } }),
        make("i", { class: "end", vars: { "--v": row.shares[row.shares.length - 1] } }),
      ),
      make("span", { class: "value" }, percent(row.shares[0], 0)),
    ),
  );
  const part =
    DATA.figures.classes_seen > agreement.length
      ? `, the ${agreement.length / 2} lowest and highest of ${number(DATA.figures.classes_seen)} classes`
      : "";
  return chart(
    "Agreement with the label, by class",
    `Cells that are taught a label of their view at the start (bar) and at the end of training (line)${part}.`,
    make("div", { class: "rows" }, ...rows),
    [
      ["class", "views", ...blends.map((b) => `blend ${b}`)],
      ...agreement.map((row) => [fullName(row.c), number(row.n), ...row.shares.map((x) => percent(x, 2))]),
    ],
    rows.length > 14 ? "tall" : "",
  );
}

function bytesChart() {
  const codecs = Object.entries(DATA.facts.codecs);
  const whole = 2 * DATA.classes * (CELLS + 1);
  const most = Math.max(...codecs.map(([, c]) => c.unit_bytes_per_view));
  const rows = codecs.map(([name, c]) =>
    make(
      "div",
      { class: "row" },
      make("span", { class: "name" }, name),
      make(
        "span",
        { class: "lane" },
        make("i", { class: "fill", vars: { "--v": c.unit_bytes_per_view / most, "--c": "var(--faint)" } }),
        make("i", { class: "fill", vars: { "--v": c.target_bytes_per_view / most } }),
      ),
      make("span", { class: "value" }, bytes(c.unit_bytes_per_view)),
    ),
  );
  const total = codecs.reduce((n, [, c]) => n + c.unit_bytes_per_view, 0);
  return chart(
    "Bytes of a view",
    `Targets (colour), and seed, digest, label and mixing (grey), compressed. Whole maps in float16 would take ${bytes(whole)}: ${(whole / total).toFixed(whole / total < 10 ? 1 : 0)} times as much.`,
    make("div", { class: "rows", "aria-hidden": "true" }, ...rows),
    [
      ["codec", "targets", "whole unit", "in all"],
      ...codecs.map(([name, c]) => [
        name,
        bytes(c.target_bytes_per_view),
        bytes(c.unit_bytes_per_view),
        bytes(c.bytes),
      ]),
    ],
  );
}
