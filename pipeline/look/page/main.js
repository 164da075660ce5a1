// The player, the keyboard, and what happens first.

let frame = 0; // of the animation while it plays
const PLAY_MS = 7000; // from the start of training to its end

function setStep(step_) {
  state.step = Math.min(Math.max(step_, 0), DATA.steps);
  writeHash();
  paint();
}

function setDecay(decay) {
  state.decay = decay;
  writeHash();
  drawCurve();
  drawDetail();
  paint();
}

// What changes with the slider, the overlay and its opacity.
function paint() {
  const blend = blendNow();
  const epoch = Math.min(Math.floor((state.step / DATA.steps) * DATA.about.epochs), DATA.about.epochs - 1);
  const words =
    blend === DATA.one
      ? "each cell its own class"
      : blend === 0
        ? "the image's class everywhere"
        : `${percent(share(blend), 0)} the cell's own, ${percent(1 - share(blend), 0)} the image's`;
  $("progress").value = state.step;
  $("progress").setAttribute(
    "aria-valuetext",
    `${percent(state.step / DATA.steps, 0)} of training, blend ${share(blend).toFixed(3)}: ${words}`,
  );
  $("progress").style.setProperty("--at", `${(100 * state.step) / DATA.steps}%`);
  $("blend").replaceChildren(
    make("b", {}, `a = ${share(blend).toFixed(3)}`),
    make("span", {}, words),
    make("small", {}, `epoch ${number(epoch)} of ${number(DATA.about.epochs)}`),
  );
  paintCards();
  paintDetail();
}

function drawCurve() {
  const line = DATA.blends[state.decay].map((blend, x) => `${x},${(23 - 22 * share(blend)).toFixed(2)}`);
  $("curve").replaceChildren(
    make("path", { class: "area", d: `M0,24L${line.join("L")}L200,24Z` }),
    make("path", { class: "line", d: `M${line.join("L")}` }),
  );
}

function play(on) {
  cancelAnimationFrame(frame);
  frame = 0;
  $("play").setAttribute("aria-pressed", on ? "true" : "false");
  $("play").querySelector("b").textContent = on ? "Stop" : "Play";
  if (!on) return writeHash();
  if (state.step === DATA.steps) state.step = 0;
  const from = performance.now() - (state.step / DATA.steps) * PLAY_MS;
  const tick = (now) => {
    const at = Math.min(Math.floor(((now - from) / PLAY_MS) * DATA.steps), DATA.steps);
    if (at !== state.step) {
      state.step = Math.max(at, 0);
      paint();
    }
    if (at >= DATA.steps) play(false);
    else frame = requestAnimationFrame(tick);
  };
  frame = requestAnimationFrame(tick);
}

function setTheme() {
  if (state.theme) document.documentElement.dataset.theme = state.theme;
  else delete document.documentElement.dataset.theme;
  $("theme").textContent = { "": "Theme: auto", light: "Theme: light", dark: "Theme: dark" }[state.theme];
}

function toSection(id) {
  $(id).scrollIntoView({ block: "start" });
}

function atSamples() {
  const box = $("samples").getBoundingClientRect();
  return box.top < innerHeight / 2 && box.bottom > innerHeight / 3;
}

function key(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || $("help").open) return;
  const target = event.target;
  const typing = target.matches("input, select, textarea");
  const cycle = (list, now) => list[(list.indexOf(now) + 1) % list.length];
  const actions = {
    ArrowLeft: () => step(-1),
    ArrowRight: () => step(1),
    ",": () => {
      play(false);
      setStep(state.step - 1);
    },
    ".": () => {
      play(false);
      setStep(state.step + 1);
    },
    d: () => setDecay(cycle(Object.keys(DATA.blends), state.decay)),
    m: () => {
      state.over = cycle(Object.keys(OVERLAYS), state.over);
      writeHash();
      paint();
    },
    "/": () => {
      toSection("samples");
      $("f-text").focus();
    },
    "?": () => $("help").showModal(),
  };
  if (atSamples()) Object.assign(actions, { ArrowUp: () => stepView(-1), ArrowDown: () => stepView(1) });
  if (!target.matches("button, summary, a")) actions[" "] = () => play(!frame);
  if (typing) {
    if (event.key === "Escape") target.blur();
    return;
  }
  if (event.key === "Escape") close();
  else if (actions[event.key]) {
    event.preventDefault();
    actions[event.key]();
  }
}

function fromHash() {
  play(false);
  readHash();
  setTheme();
  showFilters();
  $("decay").value = state.decay;
  drawCurve();
  drawDetail();
  drawGallery();
  markMatrix();
  paint();
}

function start() {
  $("progress").max = DATA.steps;
  $("decay").append(...Object.keys(DATA.blends).map((decay) => make("option", { value: decay }, decay)));
  if (matchMedia("(max-width: 900px)").matches)
    for (const one of document.querySelectorAll(".columns details")) one.open = false;
  drawOverview();
  drawRoles();
  fillFilters();
  drawMatrix();
  drawCharts();
  fromHash();
  const filters = { "f-class": "class", "f-right": "teacher", "f-mix": "mix", "f-order": "order" };
  for (const [id, name] of Object.entries(filters))
    $(id).addEventListener("change", (event) => setFilter(name, event.target.value));
  $("f-text").addEventListener("input", (event) => setFilter("text", event.target.value));
  $("f-pair").addEventListener("click", () => setFilter("pair", ""));
  $("f-clear").addEventListener("click", () => {
    for (const name of ["class", "teacher", "mix", "order", "text", "pair"]) state[name] = "";
    setFilter("pair", "");
  });
  $("filters").addEventListener("submit", (event) => event.preventDefault());
  $("progress").addEventListener("input", (event) => {
    play(false);
    setStep(+event.target.value);
  });
  $("decay").addEventListener("change", (event) => setDecay(event.target.value));
  $("play").addEventListener("click", () => play(!frame));
  $("theme").addEventListener("click", () => {
    state.theme = { "": "dark", dark: "light", light: "" }[state.theme];
    setTheme();
    writeHash();
  });
  $("help-open").addEventListener("click", () => $("help").showModal());
  // The hash holds the state, so links inside the page scroll and leave it alone.
  for (const link of document.querySelectorAll('a[href^="#"]')) {
    link.addEventListener("click", (event) => {
      event.preventDefault();
      const section = $(link.getAttribute("href").slice(1));
      toSection(section.id);
      section.setAttribute("tabindex", "-1");
      section.focus({ preventScroll: true });
    });
  }
  document.addEventListener("keydown", key);
  addEventListener("hashchange", fromHash);
  document.documentElement.dataset.ready = "yes";
}

start();
