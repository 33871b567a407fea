// The page: connects its parts, and draws.

import * as api from "./api.js";
import { $, say } from "./dom.js";
import * as form from "./form.js";
import * as gallery from "./gallery.js";
import * as input from "./input_image.js";
import { drawings } from "./jobs.js";
import * as mask from "./mask.js";
import * as session from "./session.js";
import * as sheet from "./sheet.js";
import { language, problem, switchLanguage, text, translate } from "./texts.js";

// How far a refinement goes from its image.
const REFINE_STRENGTH = 0.3;

// The form stands beside the image; otherwise above it.
const wide = matchMedia("(min-width: 900px)");

/** Send a request and append it to the session; errors are shown at their fields. Whether it was sent. */
async function send(asked) {
  form.clearErrors();
  try {
    session.add(await drawings.submit(asked));
    return true;
  } catch (error) {
    form.showError(error);
    return false;
  }
}

/** Draw what the form says, as often as it says. */
async function draw() {
  const request = form.read();
  const inputs = input.inputs();
  const { isTurn } = input.input() ?? {};
  if (inputs.image) request.strength = input.strength();
  const count = Number($("count").value);
  for (let i = 0; i < count; i += 1) {
    const asked = { request: { ...request, seed: request.seed + i }, inputs, kind: inputs.image ? "edit" : "draw" };
    if (!(await send(asked))) return;
  }
  if (!wide.matches) $("stage").scrollIntoView();
  // The next edit begins with the new image.
  if (isTurn) await input.forget();
}

/** Choose the shown image, and paint on it. */
async function edit() {
  const drawing = session.shown();
  if (drawing.request.prompt) form.write({ ...form.read(), prompt: drawing.request.prompt });
  if (!(await input.choose(drawing.blob, { isTurn: true }))) return;
  if (await input.paint()) {
    $("prompt").focus();
    $("prompt").select();
  } else await input.forget();
}

/** Draw the shown image once more, close to it. */
async function refine() {
  const { request, blob } = session.shown();
  const seed = $("new-seed").checked ? form.randomSeed() : request.seed;
  const asked = { ...request, seed, strength: REFINE_STRENGTH };
  await send({ request: asked, inputs: { image: blob }, kind: "refine" });
}

const repeat = ({ request, inputs, kind }) => send({ request, inputs, kind: kind === "sheet" ? "draw" : kind });

/** Put a drawing's request into the form. */
async function use({ request, inputs }) {
  if (inputs.image) await input.choose(inputs.image, { mask: inputs.mask });
  else await input.forget();
  form.write(request);
  form.keepSeed(request.seed);
  if (request.strength !== undefined) input.setStrength(request.strength);
  $("prompt").focus();
}

async function loadModels() {
  try {
    form.offer(await api.models());
    $("key-form").hidden = true;
    form.clearErrors();
  } catch (error) {
    if (error.status !== 401) say($("form-error"), problem(error));
  }
}

function startLanguage() {
  const show = () => {
    $("language").textContent = text("language");
    $("language").ariaLabel = text("languageLabel");
  };
  $("language").addEventListener("click", switchLanguage);
  language.addEventListener("change", show);
  translate();
  show();
}

function startKey() {
  api.access.addEventListener("unauthorized", () => {
    if (!$("key-form").hidden) return;
    $("key-form").hidden = false;
    $("key").focus();
  });
  $("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    api.useKey($("key").value.trim());
    $("key").value = "";
    loadModels();
  });
}

async function start() {
  startLanguage();
  startKey();
  form.start(draw);
  input.start(form.sizeLike);
  mask.start();
  drawings.addEventListener("change", ({ detail: drawing }) => {
    if (drawing.state === "failed" && drawing.kind !== "sheet") {
      say($("form-error"), text("failed", { message: drawing.error.message }));
    }
  });
  await drawings.load().catch((error) => say($("form-error"), String(error)));
  session.start();
  gallery.start({ continueFrom: session.add, repeat, use });
  sheet.start(form.read, gallery.openDetails);
  $("edit").addEventListener("click", edit);
  $("refine").addEventListener("click", refine);
  $("repeat").addEventListener("click", () => repeat(session.shown()));
  $("reuse-seed").addEventListener("click", () => form.keepSeed(session.shown().request.seed));
  $("open-details").addEventListener("click", () => gallery.openDetails(session.shown()));
  await loadModels();
}

start();
