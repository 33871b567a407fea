// A session: a strip of drawings that build on one another, with undo; and the one that is shown large.

import { $, announce, arrange, make, recall, remember, say } from "./dom.js";
import { drawings, isFinished } from "./jobs.js";
import { fileName } from "./recipe.js";
import { language, text } from "./texts.js";

// Parts of a drawing's steps that a screen reader is told.
const QUARTERS = 4;

let turns = [];
let undone = [];
let shownId = null;

/** The drawing that is shown large. */
export const shown = () => drawings.get(shownId);

/** Append a drawing to the session and show it; what was undone is forgotten. */
export function add(drawing) {
  if (!turns.includes(drawing.id)) turns.push(drawing.id);
  undone = [];
  show(drawing.id);
}

function undo() {
  if (turns.length === 0) return;
  undone.push(turns.pop());
  show(turns.at(-1) ?? null);
}

function redo() {
  if (undone.length === 0) return;
  turns.push(undone.pop());
  show(turns.at(-1));
}

function restart() {
  [turns, undone] = [[], []];
  show(null);
}

function show(id) {
  shownId = id;
  render();
  const item = $("strip").querySelector("[aria-current=true]");
  if (item) $("strip").scrollLeft = item.offsetLeft - $("strip").offsetLeft - 80;
}

function forget(id) {
  const place = turns.indexOf(id);
  turns = turns.filter((each) => each !== id);
  undone = undone.filter((each) => each !== id);
  if (shownId === id) show(turns[Math.max(0, place - 1)] ?? turns.at(-1) ?? null);
  else render();
}

// --- the stage ---

function progressText({ state, live = {} }) {
  if (state === "queued") return live.position > 0 ? text("queued", { count: live.position }) : text("queuedNext");
  return live.step ? text("step", live) : text("running");
}

function renderStage() {
  const drawing = shown();
  const isDone = drawing?.state === "done";
  const source = isDone ? drawings.url(drawing) : drawing?.live?.preview;
  $("image").hidden = !source;
  $("empty").hidden = Boolean(drawing);
  $("frame").classList.toggle("waiting", Boolean(drawing) && !source);
  $("frame").style.aspectRatio = drawing ? `${drawing.request.width} / ${drawing.request.height}` : "";
  if (source && $("image").src !== source) $("image").src = source;
  $("image").classList.toggle("preview", !isDone);
  $("image").alt = drawing ? text("altImage", { prompt: drawing.request.prompt }) : "";
  const isOnItsWay = Boolean(drawing) && !isFinished(drawing);
  $("progress").hidden = !isOnItsWay;
  if (isOnItsWay) {
    $("bar").value = (drawing.live?.step ?? 0) / (drawing.live?.steps ?? 1);
    say($("progress-text"), progressText(drawing));
  }
  $("actions").hidden = !isDone;
  say($("caption"), drawing ? caption(drawing) : "");
  $("warnings").replaceChildren(...(drawing?.warnings ?? []).map((warning) => make("li", {}, warning)));
  $("warnings").hidden = !drawing?.warnings?.length;
  if (isDone) Object.assign($("download"), { href: source, download: fileName(drawing) });
}

function caption({ request }) {
  return `${request.prompt} — ${request.width} × ${request.height} · ${request.seed}`;
}

// --- the strip ---

function renderStrip() {
  const old = new Map([...$("strip").children].map((item) => [item.dataset.id, item]));
  arrange($("strip"), turns.map((id) => stripItem(drawings.get(id), old.get(id))));
  $("undo").disabled = turns.length === 0;
  $("redo").disabled = undone.length === 0;
  $("new-session").disabled = turns.length === 0 && undone.length === 0;
  $("session").hidden = turns.length === 0 && undone.length === 0;
}

function stripItem(drawing, item) {
  if (!item) {
    const parts = [make("img", { alt: "" }), make("progress", { max: 1 }), make("span")];
    const button = make("button", { type: "button" }, ...parts);
    button.addEventListener("click", () => show(drawing.id));
    item = make("li", { dataset: { id: drawing.id } }, button);
  }
  const [image, bar, label] = item.firstChild.children;
  const source = drawing.blob ? drawings.url(drawing) : drawing.live?.preview;
  if (source && image.src !== source) image.src = source;
  image.hidden = !source;
  bar.hidden = isFinished(drawing);
  bar.value = (drawing.live?.step ?? 0) / (drawing.live?.steps ?? 1);
  bar.ariaLabel = text("progress");
  label.textContent = text(`${drawing.kind}_kind`);
  item.firstChild.title = drawing.request.prompt;
  item.firstChild.setAttribute("aria-current", String(drawing.id === shownId));
  return item;
}

function render() {
  turns = turns.filter((id) => drawings.get(id));
  undone = undone.filter((id) => drawings.get(id));
  renderStage();
  renderStrip();
  remember("session", { turns, undone, shownId });
}

/** Tell a screen reader how far the shown drawing is. */
function tell(drawing) {
  if (drawing.id !== shownId) return;
  const { live = {}, state } = drawing;
  if (state === "done") announce(text("done"));
  else if (state === "cancelled") announce(text("cancelled"));
  else if (state === "queued") announce(progressText(drawing));
  else if (live.step && live.step % Math.max(1, Math.round(live.steps / QUARTERS)) === 0) announce(text("step", live));
}

/** Connect the elements, after the drawings were loaded. */
export function start() {
  const kept = recall("session");
  if (kept) ({ turns, undone, shownId } = kept);
  $("undo").addEventListener("click", undo);
  $("redo").addEventListener("click", redo);
  $("new-session").addEventListener("click", restart);
  $("cancel").addEventListener("click", () => {
    drawings.cancel(shown()).catch(() => {}); // it has ended meanwhile
    $("stage").focus();
  });
  drawings.addEventListener("change", ({ detail: drawing }) => {
    if (!turns.includes(drawing.id) && drawing.id !== shownId) return;
    tell(drawing);
    if (drawing.state === "failed" || drawing.state === "cancelled") forget(drawing.id);
    else render();
  });
  drawings.addEventListener("removed", ({ detail: drawing }) => forget(drawing.id));
  language.addEventListener("change", render);
  render();
}
