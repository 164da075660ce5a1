// What a cell is taught. Whole numbers are compared, so this is, class for class, what stage 2 reads from the cache.

const CELLS = DATA.grid[0] * DATA.grid[1];
const COLOURS = DATA.colours; // the palette of pictures.py, that of the rest last
const OTHER = COLOURS.length - 1;
const CIVIDIS = [
  [0, 34, 78],
  [18, 53, 112],
  [59, 73, 108],
  [87, 93, 109],
  [112, 113, 115],
  [138, 134, 120],
  [165, 156, 116],
  [195, 179, 105],
  [254, 232, 56],
];

const blendNow = () => DATA.blends[state.decay][state.step];
const share = (blend) => blend / DATA.one;

// The class of each cell at a blend in 1/65536. A segment counts iff its start is below the blend; of those the last one.
function classesAt(view, blend) {
  const classes = new Array(CELLS);
  for (let cell = 0, at = 0; cell < CELLS; cell++) {
    let found = view.teacher;
    for (const end = at + view.n[cell]; at < end; at++) if (view.s[at] < blend) found = view.c[at];
    classes[cell] = found;
  }
  return classes;
}

// The blend up to which each cell is taught the image's class, 0 to 1.
function marginsOf(view) {
  let at = 0;
  return view.n.map((count) => {
    const margin = count ? share(view.s[at]) : 1;
    at += count;
    return margin;
  });
}

// Per view, made when first asked for: a slot for each class, margins, and the cells of each slot at each step of a decay.
const known = new WeakMap();
function about(sample, view) {
  if (known.has(view)) return known.get(view);
  const local = new Set([view.teacher, ...view.c, ...(view.said || [])]);
  const slots = new Map(view.slots.map((c, slot) => [c, slot]).filter(([c]) => c >= 0));
  for (const c of local) if (!slots.has(c)) slots.set(c, OTHER);
  const facts = { slots, margins: marginsOf(view), stories: {} };
  known.set(view, facts);
  return facts;
}

const slotOf = (facts, c) => (facts.slots.has(c) ? facts.slots.get(c) : OTHER);
const letter = (slot) => (slot === OTHER ? "" : "ABCDEFGHIJK"[slot]);
const css = (colour) => `rgb(${colour[0]} ${colour[1]} ${colour[2]})`;

function ramp(x) {
  const at = Math.min(Math.max(x, 0), 1) * (CIVIDIS.length - 1);
  const low = Math.min(Math.floor(at), CIVIDIS.length - 2);
  return CIVIDIS[low].map((v, k) => Math.round(v + (CIVIDIS[low + 1][k] - v) * (at - low)));
}

// The classes that are drawn: what the cells are taught now, or what the student says of them.
const classesShown = (view) => (state.over === "student" && view.said ? view.said : classesAt(view, blendNow()));

// Share of the cells of which the student says what they are taught at a blend.
function agreementAt(view, blend) {
  return classesAt(view, blend).filter((c, cell) => c === view.said[cell]).length / CELLS;
}

// The colour of each cell, as the overlay that is chosen has it.
function coloursOf(sample, view) {
  const facts = about(sample, view);
  if (state.over === "margin") return facts.margins.map(ramp);
  if (state.over === "entropy" && view.entropy) return view.entropy.map((x) => ramp(x / Math.log(DATA.classes)));
  return classesShown(view).map((c) => COLOURS[slotOf(facts, c)]);
}

// Cells of each slot at every step of the chosen decay: [step][slot].
function storyOf(sample, view) {
  const facts = about(sample, view);
  facts.stories[state.decay] ||= DATA.blends[state.decay].map((blend) => {
    const counts = new Array(COLOURS.length).fill(0);
    for (const c of classesAt(view, blend)) counts[slotOf(facts, c)]++;
    return counts;
  });
  return facts.stories[state.decay];
}

// Runs of steps in which a cell is taught one class: [class, first step, step after the last].
function runsOf(view, cell) {
  let begin = 0;
  for (let i = 0; i < cell; i++) begin += view.n[i];
  const runs = [];
  DATA.blends[state.decay].forEach((blend, step) => {
    let found = view.teacher;
    for (let at = begin; at < begin + view.n[cell]; at++) if (view.s[at] < blend) found = view.c[at];
    if (runs.length && runs[runs.length - 1][0] === found) runs[runs.length - 1][2] = step + 1;
    else runs.push([found, step, step + 1]);
  });
  return runs;
}
