// The overview: what the cache is, what it holds, and what is wrong with it.

function terms(rows) {
  return rows
    .filter(([, value]) => value !== null && value !== undefined && value !== "")
    .flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]);
}

function drawOverview() {
  const { facts, about } = DATA;
  const { inventory, teacher, units } = facts;
  $("title").textContent = about.title;
  $("subtitle").textContent =
    `${number(DATA.samples.length)} of ${counted(inventory.samples, "sample")}, drawn with seed ${DATA.drawn.seed}; ` +
    `teacher ${teacher.model || "unknown"}, ${facts.grid[0]} × ${facts.grid[1]} cells`;
  const banner = (text, kind, more = []) =>
    $("banners").append(
      make(
        "div",
        { class: `banner ${kind}`, role: "note" },
        make("p", {}, text),
        ...(more.length ? [make("ul", {}, ...more.map((line) => make("li", {}, line)))] : []),
      ),
    );
  const views = DATA.samples.flatMap((s) => s.views);
  const without = views.filter((v) => !v.src);
  if (without.length) {
    const reasons = [...new Set(without.map((v) => v.error))];
    banner(
      `${number(without.length)} of ${number(views.length)} views are shown without a picture; their targets are.`,
      "bad",
      [
        reasons[0],
        ...(reasons.length > 1 ? [`and ${counted(reasons.length - 1, "reason")} more: each sample says its own`] : []),
      ],
    );
  }
  const errors = [...new Set([...facts.errors, ...DATA.errors])];
  if (errors.length)
    banner(
      `${counted(errors.length, "unit")} can't be read and ${errors.length === 1 ? "is" : "are"} left out.`,
      "bad",
      errors.slice(0, 8),
    );
  if (units.missing) {
    const first = units.first_missing[0];
    banner(
      `The cache is not finished: ${number(units.missing)} of ${counted(units.total, "unit")} are missing, the first block ${first.block}, view ${first.view}.`,
      "warn",
    );
  }
  if (about.changed) banner(`Made with other library versions than are installed here: ${about.changed}.`, "warn");
  if (!DATA.cells) {
    banner("The cache holds the image's targets alone: every cell shows the image's class, at every blend.", "warn");
  } else if (!DATA.exact) {
    banner(
      `Targets are those of codec ${DATA.codec}, which has no exact ones: the class of its decoded logits at each blend. ` +
        "The figures are from the samples on this page.",
      "warn",
    );
  }

  const size = Object.values(facts.codecs).reduce((n, c) => n + c.bytes, 0);
  const perView = Object.values(facts.codecs).reduce((n, c) => n + c.unit_bytes_per_view, 0);
  const figures = DATA.figures;
  const tile = (value, name, extra = "") =>
    make("div", { class: "tile" }, make("b", {}, value), make("span", {}, name), make("small", {}, extra));
  $("tiles").append(
    tile(
      number(inventory.samples),
      "samples",
      `${number(inventory.classes)} classes, ${counted(inventory.blocks, "block")}`,
    ),
    tile(
      number(units.views),
      units.views === 1 ? "view of each" : "views of each",
      `${number(units.present)} of ${counted(units.total, "unit")} here`,
    ),
    tile(bytes(perView), "per view", `${bytes(size)} in all`),
    tile(
      percent(figures.right / Math.max(1, figures.views)),
      "teacher is right",
      `on ${number(figures.views)} augmented views`,
    ),
    tile(
      facts.sealed ? "sealed" : "not sealed",
      "state",
      facts.sealed ? "whole, by one hash over its content" : "unfinished, or damaged",
    ),
    tile(
      number(facts.quarantined.samples),
      "quarantined",
      facts.quarantined.samples ? "images that can't be decoded" : "every image was decoded",
    ),
  );
  $("identity").append(
    ...terms(
      [
        ["Cache", facts.cache],
        ["Fingerprint", make("code", {}, facts.fingerprint)],
        ["Inventory", make("code", {}, inventory.id)],
        ["Teacher", teacher.model],
        ["Weights", teacher.weights_sha256 && make("code", {}, teacher.weights_sha256)],
        [
          "Clean top-1",
          teacher.clean_top1 === null
            ? null
            : `${percent(teacher.clean_top1)} of ${number(teacher.clean_images)} images`,
        ],
        ["Arithmetic", about.precision],
        ...teacher.notes.map((note, i) => [i ? "" : "Notes", note]),
      ].map(([name, value]) => [name || "…", value]),
    ),
  );
  const plain = (value) =>
    Array.isArray(value) ? value.map((x) => +(+x).toFixed(4)).join(", ") : value === null ? "none" : String(value);
  $("recipe").append(...terms(Object.entries(facts.recipe).map(([name, value]) => [name, plain(value)])));
  $("holds").append(
    ...terms([
      ...Object.entries(facts.codecs).map(([name, codec]) => [
        name,
        `${bytes(codec.target_bytes_per_view)} per view, ${bytes(codec.unit_bytes_per_view)} with seeds and digests; ${about.gives[name]}`,
      ]),
      [
        "Soft targets",
        DATA.soft
          ? `from ${DATA.soft}; its entropy can be drawn over the image`
          : "none of cells: int8, topk and features of a linear head hold their logits",
      ],
      ...(DATA.student
        ? [
            [
              "Student",
              `${DATA.student.run} (${DATA.student.weights}); agrees in ${percent(DATA.student.agreement)} of the cells of ${counted(DATA.student.views, "view")}`,
            ],
            ...DATA.student.notes.map((note) => ["…", note]),
          ]
        : []),
      ["Begun with", `decay ${about.recorded}, ${number(about.epochs)} epochs`],
      ["Made with", about.versions],
    ]),
  );
  if (about.quarantine.length) {
    const more = facts.quarantined.samples - about.quarantine.length;
    $("quarantine").append(
      make(
        "details",
        { open: about.quarantine.length <= 10 },
        make("summary", {}, `Quarantine: ${counted(facts.quarantined.samples, "image")} without targets`),
        make(
          "div",
          { class: "scroll" },
          make(
            "table",
            {},
            make("thead", {}, make("tr", {}, make("th", {}, "Key"), make("th", {}, "Reason"))),
            make(
              "tbody",
              {},
              ...about.quarantine.map(([key, reason]) => make("tr", {}, make("td", {}, key), make("td", {}, reason))),
            ),
          ),
        ),
        ...(more > 0 ? [make("p", { class: "note" }, `and ${number(more)} more`)] : []),
      ),
    );
  }
}
