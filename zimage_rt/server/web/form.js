// The form: a request's fields, their defaults by model, and the errors at the fields that they name.

import { $, make, recall, remember, say } from "./dom.js";
import { language, problem, text } from "./texts.js";

const SHAPES = [
  ["square", 1, 1],
  ["portrait", 3, 4],
  ["landscape", 4, 3],
  ["tall", 9, 16],
  ["wide", 16, 9],
];
// Pixels of a square's side among the small shapes.
const SHAPE = 19;
// An image of at most so many times the model's own pixels is drawn at its own size.
const OWN_SIZE = 2;
// JavaScript's numbers are exact up to 2^53; 32 bits are short to read out.
const SEEDS = 2 ** 32;

let models = [];

/** The model that is chosen. */
export const model = () => models.find((each) => each.id === $("model").value) ?? models[0];

const number = (id) => ($(id).value === "" ? undefined : Number($(id).value));

/** The request that the form says, without images; a seed is always there. */
export function read() {
  if ($("new-seed").checked || $("seed").value === "") $("seed").value = randomSeed();
  const request = {
    model: model()?.id,
    prompt: $("prompt").value,
    negative_prompt: $("negative").value || undefined,
    width: number("width"),
    height: number("height"),
    num_inference_steps: number("steps"),
    guidance_scale: number("guidance"),
    seed: number("seed"),
    loras: readLoras(),
  };
  remember("form", { ...request, keepsSeed: !$("new-seed").checked });
  return Object.fromEntries(Object.entries(request).filter(([, value]) => value !== undefined));
}

/** A seed by lot. */
export const randomSeed = () => Math.floor(Math.random() * SEEDS);

/** Put a request into the form. */
export function write(request) {
  if (request.model && models.some((each) => each.id === request.model)) $("model").value = request.model;
  showModel();
  const values = {
    prompt: request.prompt,
    negative: request.negative_prompt ?? "",
    width: request.width,
    height: request.height,
    steps: request.num_inference_steps,
    guidance: request.guidance_scale,
    seed: request.seed,
  };
  for (const [id, value] of Object.entries(values)) if (value !== undefined) $(id).value = value;
  for (const row of $("loras").children) {
    const weight = request.loras?.[row.dataset.name];
    row.querySelector("[type=checkbox]").checked = weight !== undefined;
    row.querySelector("[type=number]").value = weight ?? 1;
  }
  showPreset();
}

/** Keep a seed for the drawings to come. */
export function keepSeed(seed) {
  $("seed").value = seed;
  $("new-seed").checked = false;
}

function readLoras() {
  const rows = [...$("loras").children].filter((row) => row.querySelector("[type=checkbox]").checked);
  if (rows.length === 0) return undefined;
  return Object.fromEntries(rows.map((row) => [row.dataset.name, Number(row.querySelector("[type=number]").value)]));
}

// --- models and sizes ---

/** Offer models; what was said last comes back. */
export function offer(found) {
  models = found;
  const kept = recall("form");
  $("model").replaceChildren(...models.map(({ id, role }) => make("option", { value: id }, `${id} · ${role}`)));
  if (kept && models.some((each) => each.id === kept.model)) $("model").value = kept.model;
  setDefaults();
  if (kept) {
    write(kept);
    $("new-seed").checked = !kept.keepsSeed;
  }
}

function setDefaults() {
  showModel();
  const { default_size: [width, height], num_inference_steps: steps, guidance_scale: guidance } = model();
  Object.assign($("width"), { value: width });
  Object.assign($("height"), { value: height });
  $("steps").value = steps;
  $("guidance").value = guidance;
  showPreset();
}

/** The bounds and the choices of the model that is chosen. */
function showModel() {
  const chosen = model();
  if (!chosen) return;
  for (const side of ["width", "height"]) {
    const { min, max, multiple } = chosen[side];
    Object.assign($(side), { min, max, step: multiple, title: text("sizeHint", { min, max, multiple }) });
  }
  $("presets").replaceChildren(...SHAPES.map(([name, wide, high]) => preset(name, wide, high)));
  $("input").hidden = !chosen.takes_images;
  $("loras-field").hidden = chosen.loras.length === 0;
  const rows = [...$("loras").children].map((row) => row.dataset.name);
  if (rows.join() !== chosen.loras.join()) $("loras").replaceChildren(...chosen.loras.map(loraRow));
  for (const row of $("loras").children) row.lastChild.ariaLabel = text("weightOf", { name: row.dataset.name });
  showPreset();
}

function loraRow(name) {
  const weight = make("input", { type: "number", step: 0.1, value: 1 });
  const check = make("label", { className: "check" }, make("input", { type: "checkbox" }), " ", name);
  return make("div", { className: "row", dataset: { name } }, check, weight);
}

function preset(name, wide, high) {
  const [width, height] = fitted(Math.sqrt(ownPixels() * (wide / high)), Math.sqrt(ownPixels() * (high / wide)));
  const shape = make("i", { ariaHidden: "true" });
  shape.style.width = `${SHAPE * Math.sqrt(wide / high)}px`;
  shape.style.height = `${SHAPE * Math.sqrt(high / wide)}px`;
  const [value, ratio] = [`${width}x${height}`, `${wide}:${high}`];
  const label = `${text(name)} ${ratio}, ${width} × ${height}`;
  const choice = make("input", { type: "radio", name: "preset", value, ariaLabel: label });
  choice.addEventListener("change", () => setSize(width, height));
  return make("label", { title: label }, choice, shape, make("span", {}, ratio));
}

function ownPixels() {
  const [width, height] = model().default_size;
  return width * height;
}

/** The nearest sides that the model serves. */
function fitted(width, height) {
  const fit = (side, { min, max, multiple }) => Math.min(max, Math.max(min, Math.round(side / multiple) * multiple));
  return [fit(width, model().width), fit(height, model().height)];
}

/** Take the size of an image to begin with, if it is not too large. */
export function sizeLike(width, height) {
  if (!model()) return;
  const pixels = width * height;
  const scale = pixels <= OWN_SIZE * ownPixels() ? 1 : Math.sqrt(ownPixels() / pixels);
  setSize(...fitted(width * scale, height * scale));
}

function setSize(width, height) {
  $("width").value = width;
  $("height").value = height;
  showPreset();
}

function showPreset() {
  const size = `${$("width").value}x${$("height").value}`;
  for (const choice of $("presets").querySelectorAll("input")) choice.checked = choice.value === size;
}

// --- errors ---

/** Show an error at the field that it names, and go there. */
export function showError(error) {
  clearErrors();
  const param = (error.param ?? "").split(".")[0];
  const field = param && document.querySelector(`#form [data-field~="${CSS.escape(param)}"]`);
  if (!field || field.hidden) {
    say($("form-error"), problem(error));
    return;
  }
  const line = make("p", { className: "error", id: `error-${param}` }, error.message);
  line.setAttribute("role", "alert");
  field.append(line);
  const settings = field.closest("details");
  if (settings) settings.open = true;
  const named = field.querySelector(`#${CSS.escape(param)}`);
  const control = named ?? field.querySelector("textarea, select, input:not([hidden]), button");
  control.setAttribute("aria-invalid", "true");
  control.setAttribute("aria-describedby", line.id);
  control.focus();
}

/** Forget the errors. */
export function clearErrors() {
  say($("form-error"), "");
  for (const line of document.querySelectorAll("#form .field > .error")) line.remove();
  for (const control of document.querySelectorAll("#form [aria-invalid]")) {
    control.removeAttribute("aria-invalid");
    control.removeAttribute("aria-describedby");
  }
}

/** Connect the elements; `draw` is called with the request and the number of images. */
export function start(draw) {
  const isMac = navigator.platform.startsWith("Mac");
  const showKey = () => ($("draw-key").textContent = text(isMac ? "drawKeyMac" : "drawKey"));
  showKey();
  language.addEventListener("change", () => {
    showKey();
    showModel();
  });
  $("form").addEventListener("submit", (event) => {
    event.preventDefault();
    draw();
  });
  document.addEventListener("keydown", (event) => {
    const isDraw = event.key === "Enter" && (event.ctrlKey || event.metaKey) && !event.isComposing;
    if (!isDraw || document.querySelector("dialog[open]")) return;
    event.preventDefault();
    draw();
  });
  document.addEventListener("field-error", (event) => showError(event.detail));
  $("model").addEventListener("change", setDefaults);
  for (const side of ["width", "height"]) $(side).addEventListener("input", showPreset);
  const wide = matchMedia("(min-width: 900px)");
  $("settings").open = wide.matches;
  wide.addEventListener("change", () => ($("settings").open = wide.matches));
}
