// The page of the endpoint. It asks the same interface as everybody else: /v1/models, /classes, /v1/images/generations.

const el = (id) => document.getElementById(id);
const MAX_SEED = 2 ** 32;
const HISTORY = 12;
const STEPS_COMPARED = [1, 2, 4];
const NOTES = {
  generate: "Images of one class, each of its own seed.",
  steps: "The same seed carried to an image in 1, 2 and 4 network calls.",
  interpolate: "The way from one seed's noise to another's, image by image.",
};
const BUTTONS = { generate: "Generate", steps: "Compare steps", interpolate: "Interpolate" };
// Fields of a request -> what shows their problems.
const FIELDS = {
  prompt: "class", seed: "seed", seed_end: "seed-end", n: "count", num_inference_steps: "steps",
  guidance_scale: "guidance-scale", guidance_interval: "guidance-start",
};

const state = { mode: "generate", model: null, classes: [], busy: false, retry: null };

/** What went wrong, as the endpoint says it. */
class Failure extends Error {
  constructor(message, status = 0, param = null, retryAfter = null) {
    super(message);
    Object.assign(this, { status, param, retryAfter });
  }
}

/** One request; JSON in, JSON out. Throws Failure. */
async function ask(path, body) {
  const headers = {};
  if (body) headers["content-type"] = "application/json";
  const key = sessionStorage.getItem("key");
  if (key) headers.authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body) });
  } catch {
    throw new Failure("The endpoint cannot be reached. Is it running, and are you connected?");
  }
  const text = await response.text();
  let content = null;
  try { content = JSON.parse(text); } catch { /* said below */ }
  if (response.ok && content) return content;
  const error = content?.error ?? {};
  const retryAfter = response.headers.get("retry-after");
  throw new Failure(
    error.message ?? `The endpoint answered ${response.status} ${text.slice(0, 200)}`,
    response.status, error.param ?? null, retryAfter === null ? null : Number(retryAfter),
  );
}

// Problems.

/** Shows a message beside a field, or below the button where it belongs to none. */
function showProblem(message, param = null) {
  const field = FIELDS[param?.split(".")[0]] ?? null;
  const place = field && !el(field).closest("[hidden]") ? field : null;
  if (!place) { el("problem").replaceChildren(message); return; }
  el(`${place}-problem`).textContent = message.replace(/^[\w.]+: /, "");
  el(place).setAttribute("aria-invalid", "true");
  el(place).focus();
}

function clearProblems() {
  el("problem").replaceChildren();
  for (const mark of document.querySelectorAll("p.problem")) mark.textContent = "";
  for (const input of document.querySelectorAll("[aria-invalid]")) input.removeAttribute("aria-invalid");
}

/** A field that is being changed is no longer complained of. */
function forgive(id) {
  el(id)?.removeAttribute("aria-invalid");
  const mark = el(`${id}-problem`);
  if (mark) mark.textContent = "";
}

/** What a failure means for the person at the page. */
function showFailure(failure) {
  if (!(failure instanceof Failure)) { showProblem(`This page has a fault: ${failure.message}`); throw failure; }
  if (failure.status === 401) {
    el("key-field").hidden = false;
    el("key-problem").textContent = sessionStorage.getItem("key") ? "This key is not known here." : "This endpoint wants an API key.";
    el("key").setAttribute("aria-invalid", "true");
    el("key").focus();
    return;
  }
  showProblem(failure.message, failure.param);
}

// The class combobox.

const combobox = { shown: [], active: -1 };

/** Classes that typed text may mean, whole matches first. */
function findClasses(text) {
  const word = text.trim().toLowerCase();
  if (!word) return state.classes.slice(0, 60);
  const id = word.replace(/^class:/, "");
  const rank = (entry) => {
    const names = entry.name.toLowerCase();
    if (String(entry.id) === id || entry.wnid?.toLowerCase() === word) return 0;
    if (names.split(",").some((name) => name.trim() === word)) return 1;
    if (names.startsWith(word)) return 2;
    return names.includes(word) ? 3 : 9;
  };
  const ranked = state.classes.map((entry) => [rank(entry), entry]).filter(([place]) => place < 9);
  return ranked.sort((a, b) => a[0] - b[0] || a[1].id - b[1].id).slice(0, 60).map(([, entry]) => entry);
}

function openList() {
  combobox.shown = findClasses(el("class").value);
  combobox.active = combobox.shown.length ? 0 : -1;
  el("class-list").replaceChildren(...(combobox.shown.length ? combobox.shown.map(option) : [noOption()]));
  el("class-list").hidden = false;
  el("class").setAttribute("aria-expanded", "true");
  markActive();
}

function closeList() {
  el("class-list").hidden = true;
  el("class").setAttribute("aria-expanded", "false");
  el("class").removeAttribute("aria-activedescendant");
}

function option(entry, index) {
  const item = make("li", { id: `class-${index}`, role: "option" }, make("span", {}, entry.name), make("span", { class: "id" }, String(entry.id)));
  item.addEventListener("pointerdown", (event) => { event.preventDefault(); choose(entry); });
  return item;
}

const noOption = () => make("li", { class: "none" }, state.classes.length ? "no class is called that" : "no classes yet");

function markActive() {
  [...el("class-list").children].forEach((item, index) => {
    item.setAttribute("aria-selected", String(index === combobox.active));
    if (index === combobox.active) {
      item.scrollIntoView({ block: "nearest" });
      el("class").setAttribute("aria-activedescendant", item.id);
    }
  });
}

/** A name that several classes share is written as its id. */
function choose(entry) {
  const name = entry.name.split(",")[0].trim();
  const same = state.classes.filter((other) => other.name.split(",").some((synonym) => synonym.trim().toLowerCase() === name.toLowerCase()));
  el("class").value = same.length > 1 ? `class:${entry.id}` : name;
  forgive("class");
  closeList();
  changed();
}

function onClassKey(event) {
  const isOpen = !el("class-list").hidden;
  const move = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (move) {
    event.preventDefault();
    if (!isOpen) { openList(); return; }
    const count = combobox.shown.length;
    if (count) { combobox.active = (combobox.active + move + count) % count; markActive(); }
  } else if (event.key === "Enter" && isOpen && combobox.active >= 0 && el("class").value.trim()) {
    event.preventDefault();
    choose(combobox.shown[combobox.active]);
  } else if (event.key === "Escape" && isOpen) {
    event.preventDefault();
    closeList();
  }
}

// The request.

/** A field's number; text that is none is sent as it is, for the endpoint to explain. */
function number(id) {
  const text = el(id).value.trim();
  if (text === "") return undefined;
  return Number.isFinite(Number(text)) ? Number(text) : text;
}

const randomSeed = () => Math.floor(Math.random() * MAX_SEED);

/** The body of the request that the form describes. */
function request() {
  const body = { prompt: el("class").value.trim(), n: number("count"), seed: number("seed"), num_inference_steps: number("steps") };
  if (state.mode === "steps") { body.n = 1; delete body.num_inference_steps; }
  if (state.mode === "interpolate") body.seed_end = number("seed-end");
  if (state.model?.takes_guidance) {
    body.guidance_scale = number("guidance-scale");
    const interval = [number("guidance-start"), number("guidance-end")];
    if (interval.every((time) => time !== undefined)) body.guidance_interval = interval;
  }
  if (state.model?.has_previews && el("preview").checked) body.preview = true;
  return Object.fromEntries(Object.entries(body).filter(([, value]) => value !== undefined));
}

/** Asks for images; where the endpoint is full it waits as long as it is told to, once. */
async function images(body) {
  const began = performance.now();
  try {
    return { ...(await ask("v1/images/generations", body)), roundTrip: performance.now() - began };
  } catch (failure) {
    if (![429, 503].includes(failure.status) || !failure.retryAfter || failure.retryAfter > 60) throw failure;
    await countDown(failure);
    const again = performance.now();
    return { ...(await ask("v1/images/generations", body)), roundTrip: performance.now() - again };
  }
}

/** Says when the next try is; may be hastened, or given up. */
async function countDown(failure) {
  const text = make("span", {});
  const stop = make("button", { type: "button", id: "give-up" }, "Give up");
  el("problem").replaceChildren(text, stop);
  let isOver = false;
  stop.addEventListener("click", () => { isOver = true; });
  for (let left = Math.ceil(failure.retryAfter); left > 0; left -= 1) {
    text.textContent = `${failure.message}. Trying again in ${left} s.`;
    await new Promise((resume) => setTimeout(resume, 1000));
    if (isOver) throw failure;
  }
  el("problem").replaceChildren();
}

/** What the button does, by mode; gives the results. */
const WORK = {
  async generate(body) {
    const answer = await images(body);
    addResult(answer, answer.data.map((image, index) => [source(answer, image), `seed ${image.seed ?? answer.seed + index}`, image.seed]));
  },
  async steps(body) {
    const seed = body.seed ?? randomSeed();
    const answers = [];
    for (const steps of STEPS_COMPARED.filter((count) => count <= state.model.max_steps)) {
      answers.push(await images({ ...body, seed, num_inference_steps: steps }));
    }
    const tiles = answers.map((answer) => [source(answer, answer.data[0]), `${plural(answer.num_inference_steps, "step")} · ${milliseconds(answer.timing.total_ms)}`, seed]);
    const counts = answers.map((answer) => answer.num_inference_steps).join(", ");
    const network = answers.map((answer) => milliseconds(answer.timing.model_ms)).join(", ");
    addResult(answers[0], tiles, `${answers[0].class_name} · seed ${seed} · ${counts} steps`, { timing: `network ${network}; a request each` });
  },
  async interpolate(body) {
    const seeds = { seed: body.seed ?? randomSeed(), seed_end: body.seed_end ?? randomSeed() };
    const answer = await images({ ...body, ...seeds });
    const tiles = answer.data.map((image) => [source(answer, image), image.weight.toFixed(2), null]);
    addResult(answer, tiles, `${answer.class_name} · from seed ${seeds.seed} to ${seeds.seed_end} · ${plural(answer.num_inference_steps, "step")}`, { isStrip: true });
  },
};

async function submit(event) {
  event.preventDefault();
  closeList();
  if (state.busy) return;
  clearProblems();
  if (!el("key-field").hidden && el("key").value) sessionStorage.setItem("key", el("key").value.trim());
  if (!el("class").value.trim()) { showProblem("Choose a class first.", "prompt"); return; }
  setBusy(true);
  try {
    if (!state.model) await loadModel();
    await WORK[state.mode](request());
    el("key-field").hidden = true;
    writeHash();
  } catch (failure) {
    showFailure(failure);
  } finally {
    setBusy(false);
  }
}

function setBusy(isBusy) {
  state.busy = isBusy;
  el("go").setAttribute("aria-busy", String(isBusy));
  el("go").textContent = isBusy ? "Working…" : BUTTONS[state.mode];
}

// Results.

const source = (answer, image) => `data:image/${answer.output_format};base64,${image.b64_json}`;
const milliseconds = (value) => (value >= 1000 ? `${(value / 1000).toFixed(2)} s` : `${value < 10 ? value.toFixed(1) : Math.round(value)} ms`);
const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;

/** An element with attributes and children. */
function make(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

/** An image at a size that suits its own: small ones larger, as pixels where they are much larger. */
function picture(url, size, shown, alt) {
  const image = make("img", { src: url, width: shown, height: shown, alt });
  if (shown / size > 3) image.classList.add("pixelated");
  return image;
}

function timingLine(answer) {
  const { queue_ms, model_ms, decode_ms, encode_ms, total_ms } = answer.timing;
  return `${milliseconds(answer.roundTrip)} here and back, ${milliseconds(total_ms)} of it there: queue ${milliseconds(queue_ms)}, `
    + `network ${milliseconds(model_ms)}, decoder ${milliseconds(decode_ms)}, encoding ${milliseconds(encode_ms)}`
    + (answer.preview ? " · preview decoder" : "");
}

/** Adds a result above the earlier ones. tiles: [url, caption, seed or null]. */
function addResult(answer, tiles, title, { isStrip = false, timing = timingLine(answer) } = {}) {
  const size = Number(answer.size.split("x")[0]);
  const shown = isStrip ? Math.min(size, 96) : size <= 96 ? 2 * size : size;
  const name = title ?? `${answer.class_name} · ${plural(answer.num_inference_steps, "step")}`;
  const result = make("article", { class: "result" }, make("h2", {}, name), make("p", { class: "timing" }, timing));
  if (isStrip) result.append(scrubber(tiles, size));
  const figures = tiles.map(([url, caption, seed]) => {
    const alt = `${answer.class_name}, ${caption}`;
    const button = make("button", { type: "button", "aria-label": `Enlarge: ${alt}` }, picture(url, size, shown, alt));
    button.addEventListener("click", () => view(url, `${name} · ${caption}`, seed, size, answer));
    return make("figure", {}, button, make("figcaption", {}, caption));
  });
  result.append(make("div", { class: isStrip ? "images strip" : "images" }, ...figures));
  el("results").prepend(result);
  while (el("results").children.length > HISTORY) el("results").lastChild.remove();
  el("status").textContent = `${plural(tiles.length, "image")} of ${name} in ${milliseconds(answer.roundTrip)}`;
}

/** A slider that goes through the images of a strip. */
function scrubber(tiles, size) {
  const shown = size <= 96 ? 3 * size : size;
  const image = picture(tiles[0][0], size, shown, "image at the slider's place");
  const slider = make("input", { type: "range", min: "0", max: String(tiles.length - 1), value: "0", "aria-label": "Place between the seeds" });
  slider.addEventListener("input", () => { image.src = tiles[Number(slider.value)][0]; });
  return make("div", { class: "scrub" }, image, slider);
}

/** One image, large. */
function view(url, caption, seed, size, answer) {
  const shown = Math.min(512, Math.floor(0.86 * window.innerWidth));
  Object.assign(el("viewer-image"), { src: url, width: shown, height: shown, alt: caption });
  el("viewer-image").classList.toggle("pixelated", shown / size > 3);
  el("viewer-caption").textContent = caption;
  el("viewer-download").href = url;
  el("viewer-download").download = `${answer.class_name.split(",")[0].replace(/\W+/g, "-")}-${caption.split(" · ").pop().replace(/\W+/g, "-")}.${answer.output_format}`;
  el("viewer-use").hidden = seed === null;
  el("viewer-use").onclick = () => { el("seed").value = String(seed); el("viewer").close(); changed(); };
  el("viewer").showModal();
}

// Form, address, snippets.

function setMode(mode) {
  state.mode = mode;
  for (const tab of document.querySelectorAll("[role=tab]")) {
    const isSelected = tab.dataset.mode === mode;
    tab.setAttribute("aria-selected", String(isSelected));
    tab.tabIndex = isSelected ? 0 : -1;
  }
  for (const part of document.querySelectorAll("[data-modes]")) part.hidden = !part.dataset.modes.split(" ").includes(mode);
  el("seed-label").textContent = mode === "interpolate" ? "From seed" : "Seed";
  el("mode-note").textContent = NOTES[mode];
  el("go").textContent = BUTTONS[mode];
  if (mode === "interpolate" && Number(el("count").value) < 2) el("count").value = "8";
  changed();
}

/** After every change of the form: the pressed step, the snippets. */
function changed() {
  for (const button of document.querySelectorAll("[data-steps]")) {
    button.setAttribute("aria-pressed", String(button.dataset.steps === el("steps").value.trim()));
  }
  const body = request();
  if (state.mode === "steps") body.num_inference_steps = 1;
  const base = new URL(".", location.href).href;
  const authorization = el("key-field").hidden && !sessionStorage.getItem("key") ? "" : ` \\\n  -H "Authorization: Bearer $KEY"`;
  el("curl").textContent = `curl ${base}v1/images/generations${authorization} \\\n  -H 'content-type: application/json' \\\n  -d '${JSON.stringify(body).replaceAll("'", "'\\''")}'`;
  const { prompt, n, ...extra } = body;
  el("python").textContent = `import openai\n\nclient = openai.OpenAI(base_url="${base}v1", api_key="${authorization ? "KEY" : "any"}")\n`
    + `answer = client.images.generate(prompt=${JSON.stringify(prompt)}, n=${n ?? 1}, extra_body=${python(extra)})`;
}

/** A JSON object as Python writes it. */
const python = (value) => JSON.stringify(value).replace(/:(true|false)/g, (_, word) => `:${word[0].toUpperCase()}${word.slice(1)}`).replaceAll('":', '": ').replaceAll(',"', ', "');

const REMEMBERED = { class: "class", seed: "seed", "seed-end": "to", count: "n", steps: "steps", "guidance-scale": "scale", "guidance-start": "start", "guidance-end": "end" };

function writeHash() {
  const parts = new URLSearchParams({ mode: state.mode });
  for (const [id, name] of Object.entries(REMEMBERED)) if (el(id).value.trim() && !el(id).closest("[hidden]")) parts.set(name, el(id).value.trim());
  history.replaceState(null, "", `#${parts}`);
}

function readHash() {
  const parts = new URLSearchParams(location.hash.slice(1));
  for (const [id, name] of Object.entries(REMEMBERED)) if (parts.has(name)) el(id).value = parts.get(name);
  setMode(parts.get("mode") in WORK ? parts.get("mode") : "generate");
}

async function copy(button) {
  try {
    await navigator.clipboard.writeText(el(button.dataset.copy).textContent);
    button.textContent = "Copied";
  } catch {
    button.textContent = "Select it";
  }
  setTimeout(() => { button.textContent = "Copy"; }, 1500);
}

/** The model that serves, its classes, and what may be asked of it. */
async function loadModel() {
  const [version, classes] = await Promise.all([ask("version"), ask("classes")]);
  const model = version.model;
  Object.assign(state, { model, classes });
  const registered = model.source.version ? ` version ${model.source.version}` : "";
  el("model-line").textContent = `${model.id}${registered} · ${model.image_size} × ${model.image_size} · ${plural(model.num_classes, "class").replace("classs", "classes")} · ${model.precision} · meanflow-ray ${version.version}`;
  el("guidance").hidden = !model.takes_guidance;
  if (model.takes_guidance && !el("guidance-scale").value) {
    el("guidance-scale").value = String(model.guidance_scale);
    [el("guidance-start").value, el("guidance-end").value] = model.guidance_interval.map(String);
  }
  el("preview-field").hidden = !model.has_previews;
  el("count").max = String(model.max_images);
  el("steps").max = String(model.max_steps);
  if (!el("class").value && classes.length) el("class").placeholder = `for example ${classes[classes.length > 207 ? 207 : 0].name.split(",")[0]}`;
  changed();
}

function onTabKey(event) {
  const tabs = [...document.querySelectorAll("[role=tab]")];
  const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!move) return;
  const next = tabs[(tabs.indexOf(event.target) + move + tabs.length) % tabs.length];
  next.focus();
  setMode(next.dataset.mode);
}

function listen() {
  el("form").addEventListener("submit", submit);
  el("form").addEventListener("input", (event) => { forgive(event.target.id); changed(); });
  el("class").addEventListener("input", openList);
  el("class").addEventListener("focus", () => { if (!el("class").value) openList(); });
  el("class").addEventListener("blur", closeList);
  el("class").addEventListener("keydown", onClassKey);
  for (const id of ["seed", "seed-end"]) el(`${id}-random`).addEventListener("click", () => { el(id).value = String(randomSeed()); forgive(id); changed(); });
  for (const button of document.querySelectorAll("[data-steps]")) button.addEventListener("click", () => { el("steps").value = button.dataset.steps; forgive("steps"); changed(); });
  for (const tab of document.querySelectorAll("[role=tab]")) { tab.addEventListener("click", () => setMode(tab.dataset.mode)); tab.addEventListener("keydown", onTabKey); }
  for (const button of document.querySelectorAll("[data-copy]")) button.addEventListener("click", () => copy(button));
  el("viewer-close").addEventListener("click", () => el("viewer").close());
}

listen();
readHash();
loadModel().catch((failure) => {
  el("model-line").textContent = failure.status === 401 ? "locked: an API key is wanted" : "no model answers";
  showFailure(failure);
});
