// The page: reads the form, asks the server, shows images with their times. No framework, nothing from elsewhere.

import { ClassCombobox } from "./combobox.js";
import { RequestError, call, stream, toBodies, toNumber, toSnippet } from "./requests.js";

const LARGEST_SEED = 2n ** 62n;
const MOST_RESULTS = 20; // kept in memory
const PIXELATED_FROM = 3; // times enlarged; below it, smooth is the truer picture
const KEY = "meanflow-ray.api-key";
const HINTS = {
  generate: "Image i is made from seed + i.",
  steps: "The same noise, with more and more network calls.",
  interpolate: "From one seed's noise to another's.",
};
const STAGES = ["queue", "model", "decode", "encode"];

const state = {
  mode: "generate", language: "curl", model: null, version: "", key: sessionStorage.getItem(KEY) ?? "",
  results: [], current: null, running: null, countdown: null, viewed: 0,
};

const $ = (id) => document.getElementById(id);
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const combobox = new ClassCombobox($("class"), $("class-list"), () => { mark("class", ""); refreshSnippet(); });
const enlarged = new ResizeObserver((entries) => entries.forEach(({ target }) => sharpen(target)));

/** An element with properties, and children. */
function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

/** Shows an image's own pixels once they are large enough to be seen as such. */
function sharpen(image) {
  image.classList.toggle("pixelated", image.clientWidth >= PIXELATED_FROM * (image.naturalWidth || Infinity));
}

// ---- the form -----------------------------------------------------------------------------------------------------

/** A name that the server takes for this class alone. */
function promptOf(entry) {
  const name = entry.synonyms[0];
  const isShared = combobox.classes.some((other) => other !== entry && other.synonyms.includes(name));
  return isShared || !name ? `class:${entry.id}` : name;
}

/** What the form says, as it stands; a seed left empty is undefined. */
function readForm() {
  const entry = combobox.chosen;
  const prompt = entry ? promptOf(entry) : $("class").value.trim();
  const seed = (id) => ($(id).value.trim() ? toNumber($(id).value) : undefined);
  return {
    mode: state.mode, entry, prompt,
    slug: (entry?.synonyms[0] ?? prompt).toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-") || "image",
    seed: seed("seed"), seedEnd: seed("seed-end"),
    numImages: toNumber($("num-images").value), numFrames: toNumber($("num-frames").value),
    steps: toNumber($("steps").value), compare: all("#compare input:checked").map((box) => BigInt(box.value)),
    guidanceScale: toNumber($("guidance-scale").value),
    guidanceInterval: [toNumber($("guidance-start").value), toNumber($("guidance-end").value)],
    preview: $("preview").checked,
  };
}

/** Writes settings, or an earlier result's, back into the form. */
function fillForm(settings) {
  const write = (id, value) => { if (value !== undefined) $(id).value = String(value); };
  setMode(settings.mode ?? "generate");
  if (settings.entry) combobox.choose(settings.entry);
  else if (settings.prompt !== undefined) combobox.type(settings.prompt);
  write("seed", settings.seed);
  write("seed-end", settings.seedEnd);
  write("num-images", settings.numImages);
  write("num-frames", settings.numFrames);
  write("steps", settings.steps);
  write("guidance-scale", settings.guidanceScale);
  write("guidance-start", settings.guidanceInterval?.[0]);
  write("guidance-end", settings.guidanceInterval?.[1]);
  if (settings.compare) for (const box of all("#compare input")) box.checked = settings.compare.includes(BigInt(box.value));
  if (settings.preview !== undefined) $("preview").checked = settings.preview;
  all("#form input").forEach((input) => mark(input.id, ""));
  refresh();
}

/** The settings that a link's hash holds; what it does not name is absent. */
function readHash() {
  const given = new URLSearchParams(location.hash.slice(1));
  const text = (name) => given.get(name) ?? undefined;
  return {
    isRequest: given.has("class"), mode: text("mode") in HINTS ? text("mode") : "generate", prompt: text("class"),
    entry: combobox.classes.find((entry) => String(entry.id) === text("class")),
    seed: text("seed"), seedEnd: text("to"), numImages: text("n"), numFrames: text("frames"), steps: text("steps"),
    compare: text("compare")?.split(",").filter((steps) => /^\d+$/.test(steps)).map(BigInt),
    guidanceScale: text("guidance"), guidanceInterval: text("interval")?.split(","),
    preview: given.has("preview") || undefined,
  };
}

/** Puts what makes a result again into the address, so that it can be shared as a link. */
function writeHash(settings) {
  const { mode } = settings;
  const held = { mode, class: settings.entry?.id ?? settings.prompt, seed: settings.seed };
  if (mode === "generate") held.n = settings.numImages;
  if (mode === "interpolate") Object.assign(held, { to: settings.seedEnd, frames: settings.numFrames });
  if (mode === "steps") held.compare = settings.compare.join(",");
  else held.steps = settings.steps;
  if (state.model.supports_guidance) {
    Object.assign(held, { guidance: settings.guidanceScale, interval: settings.guidanceInterval.join(",") });
  }
  if (settings.preview) held.preview = 1;
  history.replaceState(null, "", `#${new URLSearchParams(held)}`);
}

/** Shows a mode's fields. */
function setMode(mode) {
  state.mode = mode;
  selectTab(`tab-${mode}`);
  $("panel").setAttribute("aria-labelledby", `tab-${mode}`);
  $("mode-hint").textContent = HINTS[mode];
  for (const part of all("[data-modes]")) part.hidden = !part.dataset.modes.split(" ").includes(mode);
  refresh();
}

/** Selects a tab among its siblings. */
function selectTab(id) {
  for (const tab of all("[role=tab]", $(id).parentElement)) {
    tab.ariaSelected = String(tab.id === id);
    tab.tabIndex = tab.id === id ? 0 : -1;
  }
}

/** Tabs by click, arrow keys, Home and End. */
function listenToTabs(tablist, select) {
  const tabs = all("[role=tab]", tablist);
  tablist.addEventListener("click", (event) => { if (event.target.role === "tab") select(event.target); });
  tablist.addEventListener("keydown", (event) => {
    const at = tabs.indexOf(event.target);
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: tabs.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    const tab = tabs[(to + tabs.length) % tabs.length];
    tab.focus();
    select(tab);
  });
}

/** Brings what follows from the fields up to date: pressed choices, the snippet. */
function refresh() {
  for (const button of all("[data-steps]")) button.ariaPressed = String(button.dataset.steps === $("steps").value.trim());
  refreshSnippet();
}

/** Writes the request as code; seeds left to chance are those of the images in view, so that it makes these again. */
function refreshSnippet() {
  if (!state.model) return;
  const settings = readForm();
  settings.seed ??= state.current?.settings.seed;
  if (settings.mode === "interpolate") settings.seedEnd ??= state.current?.settings.seedEnd ?? 1n;
  if (settings.mode !== "generate") settings.seed ??= 0n;
  $("snippet-code").textContent = toSnippet(state.language, settings, state.model, new URL("./", location.href).href, Boolean(state.key));
}

/** A seed to start from; small, so that it can be read and told. */
const randomSeed = () => BigInt(crypto.getRandomValues(new Uint32Array(1))[0] % 1_000_000);

/** What is plainly wrong with a field, or "". It marks and does not block: the server has the last word. */
function faultOf(id) {
  const text = $(id).value.trim();
  const value = toNumber(text);
  const whole = (least, most) => (typeof value === "bigint" && value >= least && value <= most ? ""
    : `A whole number from ${least} to ${most}, please.`);
  switch (id) {
    case "seed":
    case "seed-end": return !text || !whole(0n, LARGEST_SEED) ? "" : "A whole number from 0 to 2^62, please.";
    case "num-images": return whole(1n, BigInt(state.model?.max_images ?? 64));
    case "num-frames": return whole(2n, BigInt(state.model?.max_images ?? 64));
    case "steps": return whole(1n, BigInt(state.model?.max_steps ?? 128));
    case "guidance-scale": return Number(value) >= 1 ? "" : "A number from 1, please.";
    case "guidance-start":
    case "guidance-end": {
      const [start, end] = [Number($("guidance-start").value), Number($("guidance-end").value)];
      return start >= 0 && start <= end && end <= 1 ? "" : "Times run from 0 to 1, the earlier first.";
    }
    default: return "";
  }
}

/** Writes a fault beside its field, or takes it away. */
function mark(id, fault) {
  const ids = id === "guidance-start" || id === "guidance-end" ? ["guidance-start", "guidance-end"] : [id];
  const place = $(ids.length > 1 ? "guidance-interval-error" : `${id}-error`);
  if (!place) return;
  place.textContent = fault;
  for (const each of ids) {
    if (fault) $(each).setAttribute("aria-invalid", "true");
    else $(each).removeAttribute("aria-invalid");
  }
}

/** The field that a request's parameter was read from, or null. */
function fieldOf(param) {
  const name = (param ?? "").split(".").filter((part) => part !== "body" && !/^\d+$/.test(part))[0];
  return {
    prompt: "class", class: "class", seed: "seed", seed_end: "seed-end",
    n: state.mode === "interpolate" ? "num-frames" : "num-images",
    num_inference_steps: state.mode === "steps" ? "compare" : "steps",
    guidance_scale: "guidance-scale", guidance_interval: "guidance-start", preview: "preview",
  }[name] ?? null;
}

// ---- asking -------------------------------------------------------------------------------------------------------

/** Bytes of a base64 text as an object URL. */
function toUrl(base64, format) {
  return URL.createObjectURL(new Blob([Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0))], { type: `image/${format}` }));
}

/** An image of an answer or of a stream. */
function toImage(item, index, answer, settings, body) {
  const { num_inference_steps: steps, output_format: format, class_name: name } = answer;
  const seed = body.seed_end === undefined ? body.seed + BigInt(index) : body.seed;
  const way = body.seed_end === undefined ? "" : `-to-${body.seed_end}-${index}`;
  const file = `${settings.slug}-seed-${seed}${way}-steps-${steps}.${format}`;
  // Unfinished images are soon replaced, perhaps before the browser has loaded them: nothing that must be released.
  const url = item.partial_image_index === undefined ? toUrl(item.b64_json, format) : `data:image/${format};base64,${item.b64_json}`;
  return { url, steps, name, seed, seedEnd: body.seed_end, weight: item.weight, file };
}

/** The server reads more spellings of a seed than the form does, such as 7.0. */
function adoptSeed(settings, body, seed) {
  if (typeof settings.seed !== "bigint") settings.seed = body.seed = BigInt(seed);
}

/** Asks for images that are shown together, and returns them with their times. */
async function askForGroup(body, settings, signal) {
  const [answer, roundTrip] = await call("v1/images/generations", { body, key: state.key, signal });
  adoptSeed(settings, body, answer.seed);
  const images = answer.data.map((item, index) => toImage(item, index, answer, settings, body));
  return { steps: answer.num_inference_steps, name: answer.class_name, images, timing: answer.timing, roundTrip };
}

/** As askForGroup, but shows each image as soon as it comes, and after some of the steps. */
async function streamGroup(body, settings, signal) {
  const images = [];
  let last, place;
  const partial = Number(body.num_inference_steps) > 1 ? { partial_images: 3 } : {};
  try {
    const [, roundTrip] = await stream("v1/images/generations", { body: { ...body, ...partial }, key: state.key, signal }, (event) => {
      adoptSeed(settings, body, event.seed - event.index);
      place ??= showArriving(event.class_name, Number(body.n));
      last = event;
      const image = toImage(event, event.index, event, settings, body);
      if (event.type.endsWith("completed")) images[event.index] = image;
      place(event.index, image, Boolean(images[event.index]));
    });
    if (!last) throw new RequestError("The answer ended before the first image.");
    return { steps: last.num_inference_steps, name: last.class_name, images, timing: last.timing, roundTrip };
  } catch (error) {
    dispose({ groups: [{ images: images.filter(Boolean) }] });
    const isLatest = !state.running || state.running.signal === signal; // else another request shows its images
    if (place && isLatest && state.current) show(state.current);
    else if (place && isLatest) $("result").replaceChildren();
    throw error;
  }
}

/** Makes what the form, or settings read from it before, asks for and shows it. */
async function generate(settings, isRetry = false) {
  state.running?.abort();
  const running = new AbortController();
  state.running = running;
  clearProblem();
  setBusy(true);
  const result = { settings, groups: [] };
  try {
    if (!state.model) await load(running.signal);
    settings ??= readForm();
    settings.seed ??= randomSeed();
    if (settings.mode === "interpolate") settings.seedEnd ??= randomSeed();
    if (settings.mode === "steps" && !settings.compare.length) {
      throw new RequestError("Choose at least one number of steps.", { param: "num_inference_steps" });
    }
    result.settings = settings;
    for (const body of toBodies(settings, state.model)) { // one after another, so that they do not share their times
      const isLong = settings.mode === "generate" && (Number(body.n) > 1 || Number(body.num_inference_steps) > 1);
      result.groups.push(await (isLong ? streamGroup : askForGroup)(body, settings, running.signal));
    }
  } catch (error) {
    if (state.running === running && error.name === "AbortError") announce("Cancelled.");
    else if (state.running === running) showProblem(error, () => generate(settings, true), isRetry);
  }
  if (result.groups.length && state.running === running) keep(result);
  else dispose(result);
  if (state.running === running) {
    state.running = null;
    setBusy(false);
  }
}

function setBusy(isBusy) {
  $("generate").textContent = isBusy ? "Generating" : "Generate";
  $("generate").classList.toggle("busy", isBusy);
  $("cancel").hidden = !isBusy;
  $("result").ariaBusy = String(isBusy);
}

/** Says what went wrong: beside its field where it has one, below the form otherwise. Calls `again` where that helps. */
function showProblem(error, again, isRetry) {
  if (!(error instanceof RequestError)) console.error(error);
  if (error.status === 401) {
    $("api-key-row").hidden = false;
    mark("api-key", state.key ? `This key was not taken: ${error.message}` : "This server wants an API key.");
    return $("api-key").focus();
  }
  const field = fieldOf(error.param);
  if (field && !$(field).closest("[hidden]")) {
    mark(field, error.message);
    return ($(field).querySelector("input") ?? $(field)).focus();
  }
  const mayWait = (error.status === 429 || error.status === 503) && error.retryAfter && !isRetry;
  $("form-error").textContent = mayWait ? `${error.message} Trying again in ${error.retryAfter} s.` : error.message;
  $("retry").onclick = again;
  $("retry").hidden = error.status >= 400 && error.status < 429;
  $("retry").textContent = "Try again";
  $("problem").hidden = false;
  if (mayWait) countDown(error.retryAfter, again);
}

/** Tries again once after some seconds, counting on the button. */
function countDown(seconds, again) {
  const tick = () => {
    $("retry").textContent = `Try now (${seconds} s)`;
    if (seconds-- <= 0) again();
  };
  state.countdown = setInterval(tick, 1000);
  tick();
}

function clearProblem() {
  clearInterval(state.countdown);
  $("problem").hidden = true;
  $("form-error").textContent = "";
  for (const input of all("#form input, #compare")) mark(input.id, "");
}

const announce = (text) => { $("status").textContent = text; };

// ---- results ------------------------------------------------------------------------------------------------------

const milliseconds = (value) => (value < 9.95 ? value.toFixed(1) : value.toFixed(0));
const plural = (count, noun) => `${count} ${noun}${Number(count) === 1 ? "" : "s"}`;

/** What a result was made from, in words. */
function describe({ settings, groups }) {
  const count = groups[0].images.length;
  const last = settings.seed + BigInt(count - 1);
  const seeds = settings.mode === "interpolate" ? `seeds ${settings.seed} to ${settings.seedEnd}`
    : count > 1 ? `seeds ${settings.seed} to ${last}` : `seed ${settings.seed}`;
  const steps = `${groups.map((group) => group.steps).join(", ")} ${groups.at(-1).steps === 1 ? "step" : "steps"}`;
  const extras = state.model.supports_guidance ? [`guidance ${settings.guidanceScale}`] : [];
  if (settings.preview) extras.push("preview decoder");
  return [seeds, steps, ...extras].join(" · ");
}

/** What an image shows, in words. */
function caption(image) {
  const between = image.seedEnd === undefined ? `seed ${image.seed}`
    : `${Math.round(100 * image.weight)} % of the way from seed ${image.seed} to ${image.seedEnd}`;
  return `${image.name}, ${between}, ${plural(image.steps, "step")}`;
}

/** An image that opens the viewer when pressed. */
function tile(image, images, label = "") {
  const picture = make("img", { src: image.url, alt: caption(image), decoding: "async" });
  picture.addEventListener("load", () => sharpen(picture));
  enlarged.observe(picture);
  const button = make("button", { type: "button", className: "tile" }, picture);
  button.addEventListener("click", () => view(images, images.indexOf(image)));
  return make("figure", {}, button, ...(label ? [make("figcaption", { textContent: label })] : []));
}

/** A group's times: a bar of the server's stages and the way to it and back, and the figures. */
function times({ timing, roundTrip }) {
  const parts = STAGES.map((stage) => [stage, timing[`${stage}_ms`] ?? 0]);
  const bar = make("span", { className: "bar", ariaHidden: "true" });
  for (const [stage, value] of [...parts, ["network", Math.max(0, roundTrip - timing.total_ms)]]) {
    const part = make("span", { className: stage });
    part.style.flexGrow = value;
    bar.append(part);
  }
  const figures = [...parts, ["server", timing.total_ms], ["round trip", roundTrip]].map(([name, value]) => make("span",
    { className: `figure ${name.replace(" ", "-")}` }, make("span", { className: "quiet", textContent: `${name} ` }), `${milliseconds(value)} ms`));
  return make("div", { className: "timing" }, bar, make("p", {}, ...figures.flatMap((figure) => [figure, " "])));
}

/** The same noise after 1, 2, 4... steps, side by side. */
function columnsOf(result) {
  const images = result.groups.flatMap((group) => group.images);
  return make("div", { className: "steps" }, ...result.groups.map((group) => make("section", { className: "column" },
    make("h3", { textContent: plural(group.steps, "step") }), tile(group.images[0], images), times(group))));
}

/** The images between two seeds: a large one, a slider, and the strip of all. */
function stripOf({ groups: [group] }) {
  const images = group.images;
  const stage = make("div", { className: "stage" });
  const range = { type: "range", min: 0, max: images.length - 1, step: 1, value: 0 };
  const slider = make("input", { id: "scrub", ...range, ariaLabel: "Position between the two seeds" });
  const readout = make("output", { id: "scrub-value", htmlFor: "scrub" });
  const large = images.map((image) => tile(image, images));
  stage.append(...large);
  const strip = make("div", { className: "strip", id: "strip" }, ...images.map((image) => tile(image, images)));
  const show = () => {
    const at = Number(slider.value);
    large.forEach((figure, index) => { figure.hidden = index !== at; });
    [...strip.children].forEach((figure, index) => figure.classList.toggle("current", index === at));
    readout.textContent = `${at + 1} of ${images.length} · weight ${images[at].weight.toFixed(2)}`;
    slider.setAttribute("aria-valuetext", readout.textContent);
  };
  slider.addEventListener("input", show);
  show();
  return make("div", { className: "interpolation" }, stage, make("div", { className: "scrubber" }, slider, readout), strip, times(group));
}

/** The images of one class. */
function gridOf({ groups: [group] }) {
  const { images } = group;
  const grid = make("div", { className: images.length === 1 ? "grid single" : "grid" },
    ...images.map((image) => tile(image, images, images.length > 1 ? String(image.seed) : "")));
  return make("div", {}, grid, times(group));
}

/** Shows empty places for images to come. Returns a function that puts an image into its place. */
function showArriving(name, count) {
  const grid = make("div", { className: count === 1 ? "grid single" : "grid" },
    ...Array.from({ length: count }, () => make("figure", {}, make("div", { className: "tile arriving" }))));
  $("result").replaceChildren(make("article", {},
    make("header", { className: "result-head" }, make("h2", { textContent: name })), grid));
  return (index, image, isFinished) => {
    const figure = tile(image, [image], count > 1 ? String(image.seed) : "");
    figure.classList.toggle("unfinished", !isFinished);
    grid.replaceChild(figure, grid.children[index]);
  };
}

/** Shows a result in the place of the present one. */
function show(result) {
  state.current = result;
  const link = make("button", { type: "button", id: "copy-link", textContent: "Copy link" });
  link.addEventListener("click", () => copy(location.href, link));
  const head = make("header", { className: "result-head" }, make("h2", { textContent: result.groups[0].name }),
    make("p", { className: "quiet", textContent: describe(result) }), link);
  const body = { generate: gridOf, steps: columnsOf, interpolate: stripOf }[result.settings.mode](result);
  enlarged.disconnect();
  $("result").replaceChildren(make("article", {}, head, body));
  all("img").forEach((image) => enlarged.observe(image));
  writeHash(result.settings);
  refreshSnippet();
  showHistory();
}

/** Keeps a new result, shows it, and lets the oldest go. */
function keep(result) {
  state.results.unshift(result);
  state.results.splice(MOST_RESULTS).forEach(dispose);
  show(result);
  bringIntoView();
  const count = result.groups.reduce((sum, group) => sum + group.images.length, 0);
  const total = result.groups.reduce((sum, group) => sum + group.roundTrip, 0);
  announce(`${plural(count, "image")} of ${result.groups[0].name} in ${milliseconds(total)} milliseconds.`);
}

/** Where the form stands above the images, as on a phone, scrolls to them. */
function bringIntoView() {
  if ($("result").getBoundingClientRect().top < window.innerHeight * 0.6) return;
  const isCalm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  $("result").scrollIntoView({ block: "start", behavior: isCalm ? "auto" : "smooth" });
}

function dispose({ groups }) {
  for (const group of groups) for (const image of group.images) URL.revokeObjectURL(image.url);
}

function showHistory() {
  const earlier = state.results.filter((result) => result !== state.current);
  $("history-section").hidden = earlier.length === 0;
  $("history").replaceChildren(...earlier.map((result) => {
    const images = result.groups.flatMap((group) => group.images);
    const thumbs = make("span", { className: "thumbs" }, ...images.slice(0, 4).map((image) => make("img", { src: image.url, alt: "" })));
    const more = images.length > 4 ? ` · ${images.length} images` : "";
    const button = make("button", { type: "button", className: "past" }, thumbs,
      make("span", { className: "past-name", textContent: result.groups[0].name }),
      make("span", { className: "quiet", textContent: describe(result) + more }));
    button.addEventListener("click", () => {
      clearProblem();
      fillForm(result.settings);
      show(result);
      $("result").scrollIntoView({ block: "nearest" });
    });
    return make("li", {}, button);
  }));
}

// ---- the viewer ---------------------------------------------------------------------------------------------------

/** Opens the viewer on one of several images. */
function view(images, index) {
  const image = images[(index + images.length) % images.length];
  Object.assign(state, { viewed: images.indexOf(image), viewedImages: images });
  Object.assign($("viewer-image"), { src: image.url, alt: caption(image) });
  $("viewer-caption").textContent = caption(image);
  Object.assign($("download"), { href: image.url, download: image.file });
  $("viewer-previous").hidden = $("viewer-next").hidden = images.length < 2;
  $("viewer-use").hidden = image.seedEnd !== undefined;
  if (!$("viewer").open) $("viewer").showModal();
}

function listenToViewer() {
  const turn = (by) => view(state.viewedImages, state.viewed + by);
  $("viewer-previous").addEventListener("click", () => turn(-1));
  $("viewer-next").addEventListener("click", () => turn(1));
  $("viewer-close").addEventListener("click", () => $("viewer").close());
  $("viewer").addEventListener("click", (event) => { if (event.target === $("viewer")) $("viewer").close(); });
  $("viewer").addEventListener("keydown", (event) => {
    if (event.key === "ArrowRight") turn(1);
    if (event.key === "ArrowLeft") turn(-1);
  });
  $("viewer-image").addEventListener("load", () => sharpen($("viewer-image")));
  $("viewer-use").addEventListener("click", () => {
    $("seed").value = String(state.viewedImages[state.viewed].seed);
    $("viewer").close();
    refresh();
    $("seed").focus();
  });
}

// ---- start --------------------------------------------------------------------------------------------------------

/** Copies a text and says so on the button; works on plain http too, where browsers offer no clipboard. */
async function copy(text, button) {
  const label = button.dataset.label ??= button.textContent;
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = document.body.appendChild(make("textarea", { value: text, className: "visually-hidden" }));
    area.select();
    document.execCommand("copy");
    area.remove();
    button.focus();
  }
  button.textContent = "Copied";
  setTimeout(() => { button.textContent = label; }, 1500);
}

/** Loads what the page needs to know of the model. Throws RequestError. */
async function load(signal) {
  const options = { key: state.key, signal };
  const answers = await Promise.all(["v1/models", "classes", "version"].map((path) => call(path, options)));
  const [[models], [classes], [version]] = answers;
  state.model = models.data[0];
  state.version = version.version;
  combobox.setClasses(classes);
  showModel();
  const hash = readHash();
  if (hash.isRequest) fillForm(hash);
  else if ($("class").value.trim()) combobox.settle();
  else combobox.choose(combobox.classes[207] ?? combobox.classes[0]);
  refresh();
  return hash.isRequest;
}

/** Shows the model's facts and the fields that only some models have. */
function showModel() {
  const { model } = state;
  const facts = {
    Model: model.id, Image: `${model.image_size} × ${model.image_size}`, Classes: model.num_classes,
    Precision: model.precision, Version: state.version,
  };
  $("facts").replaceChildren(...Object.entries(facts).filter(([, value]) => value).map(([name, value]) => make("div", {},
    make("dt", { textContent: name }), make("dd", { id: `fact-${name.toLowerCase()}`, textContent: value }))));
  document.title = `${model.id} · meanflow-ray`;
  document.documentElement.style.setProperty("--native", `${model.image_size}px`);
  document.documentElement.classList.toggle("small-images", model.image_size < 192);
  for (const part of [...all("[data-steps]"), ...all("#compare label")]) {
    part.hidden = Number(part.dataset.steps ?? part.firstElementChild.value) > model.max_steps;
  }
  $("guidance").hidden = !model.supports_guidance;
  $("guidance-scale").value ||= model.guidance_scale;
  $("guidance-start").value ||= model.guidance_interval?.[0] ?? 0;
  $("guidance-end").value ||= model.guidance_interval?.[1] ?? 1;
  $("preview-row").hidden = !model.has_previews;
}

/** Loads the model, and makes what a link asks for. */
async function start(isRetry = false) {
  clearProblem();
  try {
    if (await load()) await generate(readForm());
  } catch (error) {
    showProblem(error, () => start(true), isRetry);
  }
}

function listenToForm() {
  $("form").addEventListener("submit", (event) => {
    event.preventDefault();
    combobox.settle();
    combobox.close();
    generate(state.model ? readForm() : undefined);
  });
  $("cancel").addEventListener("click", () => state.running?.abort());
  $("form").addEventListener("input", (event) => { mark(event.target.id, ""); refresh(); });
  $("form").addEventListener("change", (event) => mark(event.target.id, faultOf(event.target.id)));
  $("compare").addEventListener("change", () => mark("compare", ""));
  $("api-key").addEventListener("input", () => {
    state.key = $("api-key").value.trim();
    sessionStorage.setItem(KEY, state.key);
  });
  for (const button of all("[data-steps]")) {
    button.addEventListener("click", () => { $("steps").value = button.dataset.steps; mark("steps", ""); refresh(); });
  }
  for (const button of all("[data-rolls]")) {
    button.addEventListener("click", () => { $(button.dataset.rolls).value = String(randomSeed()); mark(button.dataset.rolls, ""); refresh(); });
  }
}

listenToTabs($("tab-generate").parentElement, (tab) => { clearProblem(); setMode(tab.dataset.mode); });
listenToTabs($("tab-curl").parentElement, (tab) => {
  state.language = tab.dataset.language;
  selectTab(tab.id);
  $("snippet").setAttribute("aria-labelledby", tab.id);
  refreshSnippet();
});
$("copy-snippet").addEventListener("click", () => copy($("snippet-code").textContent, $("copy-snippet")));
$("clear-history").addEventListener("click", () => {
  state.results.filter((result) => result !== state.current).forEach(dispose);
  state.results = state.results.filter((result) => result === state.current);
  showHistory();
});
window.addEventListener("hashchange", () => {
  clearProblem();
  if (state.model && readHash().isRequest) { fillForm(readHash()); generate(readForm()); }
});
listenToForm();
listenToViewer();
setMode("generate");
start();
