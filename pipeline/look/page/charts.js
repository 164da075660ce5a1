// Overview, confusion matrix and distributions: drawn once, from counts over whole units.

function terms(rows) {
  return rows.filter(([, value]) => value !== null && value !== undefined && value !== "")
    .flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]);
}

function drawOverview() {
  const { facts, about } = DATA;
  const { inventory, teacher, units } = facts;
  $("title").textContent = about.title;
  $("subtitle").textContent = `${number(DATA.samples.length)} of ${counted(inventory.samples, "sample")}, drawn with seed ${DATA.drawn.seed}; `
    + `teacher ${teacher.model || "unknown"}, ${facts.grid[0]} × ${facts.grid[1]} cells`;
  const banner = (text, kind, more = []) => $("banners").append(make("div", { class: `banner ${kind}`, role: "note" }, make("p", {}, text),
    ...(more.length ? [make("ul", {}, ...more.map((line) => make("li", {}, line)))] : [])));
  const views = DATA.samples.flatMap((s) => s.views);
  const without = views.filter((v) => !v.src);
  if (without.length) {
    const reasons = [...new Set(without.map((v) => v.error))];
    banner(`${number(without.length)} of ${number(views.length)} views are shown without a picture; their targets are.`, "bad",
      [reasons[0], ...(reasons.length > 1 ? [`and ${counted(reasons.length - 1, "reason")} more: each sample says its own`] : [])]);
  }
  const errors = [...new Set([...facts.errors, ...DATA.errors])];
  if (errors.length) banner(`${counted(errors.length, "unit")} can't be read and ${errors.length === 1 ? "is" : "are"} left out.`, "bad", errors.slice(0, 8));
  if (units.missing) {
    const first = units.first_missing[0];
    banner(`The cache is not finished: ${number(units.missing)} of ${counted(units.total, "unit")} are missing, the first block ${first.block}, view ${first.view}.`, "warn");
  }
  if (about.changed) banner(`Made with other library versions than are installed here: ${about.changed}.`, "warn");
  if (!DATA.exact) {
    banner(`Targets are those of codec ${DATA.codec}, which has no exact ones: the class of its decoded logits at each blend. `
      + "The figures are from the samples on this page.", "warn");
  }

  const size = Object.values(facts.codecs).reduce((n, c) => n + c.bytes, 0);
  const perView = Object.values(facts.codecs).reduce((n, c) => n + c.unit_bytes_per_view, 0);
  const figures = DATA.figures;
  const tile = (value, name, extra = "") => make("div", { class: "tile" }, make("b", {}, value), make("span", {}, name), make("small", {}, extra));
  $("tiles").append(
    tile(number(inventory.samples), "samples", `${number(inventory.classes)} classes, ${counted(inventory.blocks, "block")}`),
    tile(number(units.views), units.views === 1 ? "view of each" : "views of each", `${number(units.present)} of ${counted(units.total, "unit")} here`),
    tile(bytes(perView), "a view", `${bytes(size)} in all`),
    tile(percent(figures.right / Math.max(1, figures.views)), "teacher is right", `on ${number(figures.views)} augmented views`),
    tile(facts.sealed ? "sealed" : "not sealed", "state", facts.sealed ? "whole, by one hash over its content" : "unfinished, or damaged"),
    tile(number(facts.quarantined.samples), "quarantined", facts.quarantined.samples ? "images that can't be decoded" : "every image was decoded"),
  );
  $("identity").append(...terms([
    ["Cache", facts.cache], ["Fingerprint", make("code", {}, facts.fingerprint)], ["Inventory", make("code", {}, inventory.id)],
    ["Teacher", teacher.model], ["Weights", teacher.weights_sha256 && make("code", {}, teacher.weights_sha256)],
    ["Clean top-1", teacher.clean_top1 === null ? null : `${percent(teacher.clean_top1)} of ${number(teacher.clean_images)} images`],
    ["Arithmetic", about.precision], ...teacher.notes.map((note, i) => [i ? "" : "Notes", note]),
  ].map(([name, value]) => [name || "…", value])));
  const plain = (value) => (Array.isArray(value) ? value.map((x) => +(+x).toFixed(4)).join(", ") : value === null ? "none" : String(value));
  $("recipe").append(...terms(Object.entries(facts.recipe).map(([name, value]) => [name, plain(value)])));
  $("holds").append(...terms([
    ...Object.entries(facts.codecs).map(([name, codec]) => [name,
      `${bytes(codec.target_bytes_per_view)} a view, ${bytes(codec.unit_bytes_per_view)} with seeds and digests; `
      + `${codec.exact_hard ? "exact hard targets" : "approximate hard targets"}${codec.soft ? ", soft ones" : ", no soft ones"}`]),
    ["Soft targets", DATA.soft ? `from ${DATA.soft}; its entropy can be drawn over the image` : "none: only int8 and topk hold logits"],
    ["Begun with", `decay ${about.recorded}, ${number(about.epochs)} epochs`],
    ["Made with", about.versions],
  ]));
  if (about.quarantine.length) {
    const more = facts.quarantined.samples - about.quarantine.length;
    $("quarantine").append(make("details", { open: about.quarantine.length <= 10 },
      make("summary", {}, `Quarantine: ${counted(facts.quarantined.samples, "image")} without targets`),
      make("div", { class: "scroll" }, make("table", {}, make("thead", {}, make("tr", {}, make("th", {}, "Key"), make("th", {}, "Reason"))),
        make("tbody", {}, ...about.quarantine.map(([key, reason]) => make("tr", {}, make("td", {}, key), make("td", {}, reason)))))),
      ...(more > 0 ? [make("p", { class: "note" }, `and ${number(more)} more`)] : [])));
  }
}

function drawRoles() {
  const texts = ["the teacher's class of the whole image", "the label, where the teacher says another", "the label of the mix partner"];
  $("roles").replaceChildren(
    ...texts.map((text, slot) => make("li", {}, make("i", { vars: { "--c": css(COLOURS[slot]) } }, letter(slot)), text)),
    make("li", {}, ...[3, 4, 5, 6, 7, 8, 9, 10].map((slot) => make("i", { vars: { "--c": css(COLOURS[slot]) } }, letter(slot))), "other classes, per view"),
    make("li", {}, make("i", { vars: { "--c": css(COLOURS[OTHER]) } }), "the rest"));
}

function drawMatrix() {
  const { classes, counts } = DATA.figures.matrix;
  const shown = new Map();
  for (const sample of DATA.samples) for (const v of sample.views) {
    const key = `${bucket(v.meant)}:${bucket(v.teacher)}`;
    shown.set(key, (shown.get(key) || 0) + 1);
  }
  const found = new Map(counts.map(([label, cls, n]) => [`${label}:${cls}`, n]));
  const axis = counts.some(([label, cls]) => label < 0 || cls < 0) ? [...classes, -1] : classes;
  const rowSum = (label) => axis.reduce((n, cls) => n + (found.get(`${label}:${cls}`) || 0), 0);
  const head = make("tr", {}, make("td", { class: "corner" }, make("span", {}, "label ↓  teacher →")),
    ...axis.map((c) => make("th", { scope: "col", title: nameOf(c) }, make("span", {}, nameOf(c)))));
  const rows = axis.map((label) => {
    const sum = Math.max(1, rowSum(label));
    return make("tr", {}, make("th", { scope: "row", title: nameOf(label) }, nameOf(label)), ...axis.map((cls) => {
      const key = `${label}:${cls}`;
      const n = found.get(key) || 0;
      const here = shown.get(key) || 0;
      const text = `label ${nameOf(label)}, teacher ${nameOf(cls)}: ${counted(n, "view")}, ${here} on this page`;
      const heat = n ? 0.12 + 0.88 * Math.sqrt(n / sum) : 0;
      const kind = label !== cls ? "bad" : label < 0 ? "both" : "good";
      const inside = here ? make("button", { type: "button", "data-pair": key, "aria-pressed": "false", "aria-label": text,
        on: { click: () => { setFilter("pair", state.pair === key ? "" : key); if (state.pair) toSection("samples"); } } }, short(n)) : n ? short(n) : "";
      return make("td", { class: n ? `${kind}${heat > 0.6 ? " hot" : ""}` : "", title: text, vars: { "--heat": heat.toFixed(3) } }, inside);
    }));
  });
  const cell = Math.round(Math.min(52, Math.max(32, 640 / axis.length)));
  $("matrix").replaceChildren(make("table", { class: "matrix", vars: { "--cell": `${cell}px` } }, make("caption", {}, "Views by label and by the teacher's class"),
    make("thead", {}, head), make("tbody", {}, ...rows)));
  const most = DATA.figures.mistakes.length ? DATA.figures.mistakes[0][2] : 1;
  $("mistakes").replaceChildren(...DATA.figures.mistakes.map(([label, cls, n]) => {
    const key = `${label}:${cls}`;
    const here = inMatrix.has(label) && inMatrix.has(cls) ? shown.get(key) || 0 : 0;
    return make("button", { type: "button", class: "row", "data-pair": key, "aria-pressed": "false", disabled: !here,
      title: `${counted(n, "view")}, ${here} on this page`, on: { click: () => { setFilter("pair", key); toSection("samples"); } } },
    make("span", { class: "name" }, `${nameOf(label)} → ${nameOf(cls)}`),
    make("span", { class: "lane" }, make("i", { class: "fill", vars: { "--v": n / most, "--c": "#d55e00" } })), make("span", { class: "value" }, number(n)));
  }));
  $("confusion-note").textContent = `${counted(DATA.figures.views, "view")} of ${counted(DATA.figures.units, "unit")}. `
    + "A mixed view counts for the label that the teacher names, if that is one of its two, else for the one with the larger share. "
    + "A framed cell has views on this page: press it to see them."
    + (axis.includes(-1) ? ` Of ${number(DATA.classes)} classes these ${classes.length} are shown, mistakes with pictures first.` : "");
}

const short = (n) => (n < 1000 ? String(n) : n < 1e6 ? `${(n / 1000).toFixed(n < 1e4 ? 1 : 0)}k` : `${(n / 1e6).toFixed(1)}M`);

function markMatrix() {
  for (const button of $("confusion").querySelectorAll("[data-pair]")) {
    button.setAttribute("aria-pressed", button.dataset.pair === state.pair ? "true" : "false");
  }
}

// A chart of horizontal or vertical bars, with its numbers as a table for those who don't see it.
function chart(title, note, body, table, kind = "") {
  return make("figure", { class: `panel ${kind}` }, make("h3", {}, title), make("p", { class: "note" }, note), body,
    make("details", { class: "numbers" }, make("summary", {}, "Numbers"), make("div", { class: "scroll" }, make("table", {},
      make("thead", {}, make("tr", {}, ...table[0].map((cell) => make("th", {}, cell)))),
      make("tbody", {}, ...table.slice(1).map((row) => make("tr", {}, ...row.map((cell) => make("td", {}, String(cell))))))))));
}

// Bars of values; what is above `most` is cut there, and its share written on it.
function columns(values, labels, tips, colour = "var(--accent)", most = Math.max(...values, 1), total = 1) {
  return make("div", { class: "columns-chart", "aria-hidden": "true" }, ...values.map((value, i) => make("div", { class: "col", title: tips[i] },
    value > most ? make("span", { class: "cut" }, percent(value / total, 0)) : null,
    make("span", { class: "fill", vars: { "--v": Math.min(1, value / most) * (value > most ? 0.9 : 1), "--c": typeof colour === "function" ? colour(i) : colour } }),
    make("span", { class: "tick" }, labels[i]))));
}

function drawCharts() {
  const { segments, margins, agreement, views, units, blends } = DATA.figures;
  $("figures-note").textContent = `From ${counted(views, "view")} of ${counted(units, "unit")}, ${number(DATA.figures.mixed)} of them mixed.`;
  const cells = segments.reduce((n, [, count]) => n + count, 0) || 1;
  const mean = segments.reduce((n, [k, count]) => n + k * count, 0) / cells;
  const shown = segments.length > 12 ? [...segments.slice(0, 11), [`${segments[11][0]}+`, segments.slice(11).reduce((n, s) => n + s[1], 0)]] : segments;
  const never = margins[margins.length - 1];
  const bins = margins.length - 1;
  const span = (i) => (i === bins ? "never leaves" : `${(i / bins).toFixed(2)} to ${((i + 1) / bins).toFixed(2)}`);
  const figures = [
    chart("Classes that a cell is taught over training", `Segments of its envelope, ${mean.toFixed(2)} on average: 1 means that the cell agrees with the image at every blend.`,
      columns(shown.map((s) => s[1]), shown.map((s) => String(s[0])), shown.map((s) => `${s[0]}: ${percent(s[1] / cells)} of the cells`)),
      [["segments", "cells", "share"], ...segments.map(([k, n]) => [k, number(n), percent(n / cells, 2)])]),
    chart("Margins", `Blend up to which a cell keeps the image's class. ${percent(never / cells)} of the cells never leave it; those that leave at a small blend differ for most of training.`,
      columns(margins, margins.map((_, i) => (i === bins ? "∞" : i % 5 ? "" : (i / bins).toFixed(2).replace(/0$/, ""))), margins.map((n, i) => `${span(i)}: ${percent(n / cells)} of the cells`),
        (i) => css(ramp(i / bins)), Math.max(1, ...margins.slice(0, bins)) * 1.1, cells),
      [["margin", "cells", "share"], ...margins.map((n, i) => [span(i), number(n), percent(n / cells, 2)])]),
    bytesChart(),
    agreementChart(agreement, blends),
  ];
  $("charts").replaceChildren(...figures);
}

function agreementChart(agreement, blends) {
  const rows = agreement.map((row) => make("button", {
    type: "button", class: "row", title: `${fullName(row.c)}: ${blends.map((b, k) => `${percent(row.shares[k])} at blend ${b}`).join(", ")}; ${counted(row.n, "view")}`,
    disabled: !$("f-class").querySelector(`option[value="${row.c}"]`),
    on: { click: () => { setFilter("class", String(row.c)); toSection("samples"); } },
  }, make("span", { class: "name" }, nameOf(row.c)), make("span", { class: "lane" },
    make("i", { class: "fill", vars: { "--v": row.shares[0] } }), make("i", { class: "end", vars: { "--v": row.shares[row.shares.length - 1] } })),
  make("span", { class: "value" }, percent(row.shares[0], 0))));
  const part = DATA.figures.classes_seen > agreement.length ? `, the ${agreement.length / 2} lowest and highest of ${number(DATA.figures.classes_seen)} classes` : "";
  return chart("Agreement with the label, by class", `Cells that are taught a label of their view at the start (bar) and at the end of training (line)${part}.`,
    make("div", { class: "rows" }, ...rows),
    [["class", "views", ...blends.map((b) => `blend ${b}`)], ...agreement.map((row) => [fullName(row.c), number(row.n), ...row.shares.map((x) => percent(x, 2))])],
    rows.length > 14 ? "tall" : "");
}

function bytesChart() {
  const codecs = Object.entries(DATA.facts.codecs);
  const whole = 2 * DATA.classes * (CELLS + 1);
  const most = Math.max(...codecs.map(([, c]) => c.unit_bytes_per_view));
  const rows = codecs.map(([name, c]) => make("div", { class: "row" }, make("span", { class: "name" }, name), make("span", { class: "lane" },
    make("i", { class: "fill", vars: { "--v": c.unit_bytes_per_view / most, "--c": "var(--faint)" } }),
    make("i", { class: "fill", vars: { "--v": c.target_bytes_per_view / most } })), make("span", { class: "value" }, bytes(c.unit_bytes_per_view))));
  const total = codecs.reduce((n, [, c]) => n + c.unit_bytes_per_view, 0);
  return chart("Bytes of a view", `Targets (colour), and seed, digest, label and mixing (grey), compressed. Whole maps in float16 would take ${bytes(whole)}: ${(whole / total).toFixed(whole / total < 10 ? 1 : 0)} times as much.`,
    make("div", { class: "rows", "aria-hidden": "true" }, ...rows),
    [["codec", "targets", "whole unit", "in all"], ...codecs.map(([name, c]) => [name, bytes(c.target_bytes_per_view), bytes(c.unit_bytes_per_view), bytes(c.bytes)])]);
}
