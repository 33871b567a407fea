// The sheet of `zimage explain`: one prompt and seed at several step counts and guidance scales, in a grid.

import { $, make, say } from "./dom.js";
import { drawings, isFinished } from "./jobs.js";
import { language, problem, text } from "./texts.js";

const MAX_IMAGES = 36;

let axes = null; // { steps, guidances }
let cells = new Map(); // by the drawing's id
let isCancelled = false;

function numbers(id, isFine) {
  const found = $(id).value.split(/[,，、\s]+/).filter(Boolean).map(Number);
  return found.length && found.every((value) => Number.isFinite(value) && isFine(value)) ? [...new Set(found)] : null;
}

function readAxes() {
  const steps = numbers("sheet-steps", (value) => Number.isInteger(value) && value > 0);
  const guidances = numbers("sheet-guidance", (value) => value >= 0);
  return steps && guidances && steps.length * guidances.length <= MAX_IMAGES ? { steps, guidances } : null;
}

function renderLabels() {
  if (!axes) return;
  const labels = [...$("sheet-table").querySelectorAll("th[scope]")];
  for (const label of labels) label.textContent = text(label.dataset.key, { value: label.dataset.value });
}

/** The empty grid; its cells in the order of drawing. */
function makeTable({ steps, guidances }) {
  const head = (key, value, scope) => make("th", { scope, dataset: { key, value } });
  const columns = steps.map((value) => head("sheetSteps", value, "col"));
  const cell = () => make("td", {}, make("progress", { max: 1, value: 0, ariaLabel: text("progress") }));
  const rows = guidances.map((guidance) => make("tr", {}, head("sheetGuidance", guidance, "row"), ...steps.map(cell)));
  $("sheet-table").replaceChildren(
    make("thead", {}, make("tr", {}, make("td"), ...columns)),
    make("tbody", {}, ...rows),
  );
  $("sheet-table").hidden = false;
  renderLabels();
  return rows.map((row) => [...row.querySelectorAll("td")]);
}

const pause = (seconds) => new Promise((resolve) => setTimeout(resolve, 1000 * seconds));

/** Send a request, again while the queue is full; null if it was cancelled meanwhile. */
async function submit(asked) {
  while (!isCancelled) {
    try {
      return await drawings.submit(asked);
    } catch (error) {
      if (error.status !== 429) throw error;
      await pause(Math.max(1, error.retryAfter));
    }
  }
  return null;
}

async function draw(read, open) {
  axes = readAxes();
  say($("sheet-error"), axes ? "" : text("sheetNumbers"));
  if (!axes) return;
  isCancelled = false;
  cells = new Map();
  $("sheet-cancel").hidden = false;
  const table = makeTable(axes);
  const request = read();
  try {
    for (const [row, guidance_scale] of axes.guidances.entries()) {
      for (const [column, num_inference_steps] of axes.steps.entries()) {
        const asked = { ...request, guidance_scale, num_inference_steps };
        const drawing = await submit({ request: asked, kind: "sheet" });
        if (!drawing) return;
        cells.set(drawing.id, table[row][column]);
        render(drawing, open);
      }
    }
  } catch (error) {
    say($("sheet-error"), problem(error));
    await cancel();
  }
}

async function cancel() {
  isCancelled = true;
  $("sheet-cancel").hidden = true;
  const left = [...cells.keys()].map((id) => drawings.get(id)).filter((drawing) => drawing && !isFinished(drawing));
  await Promise.allSettled(left.map((drawing) => drawings.cancel(drawing)));
}

function render(drawing, open) {
  const cell = cells.get(drawing.id);
  if (!cell) return;
  if (drawing.state === "done") {
    const alt = text("altImage", { prompt: drawing.request.prompt });
    const image = make("img", { src: drawings.url(drawing), alt });
    const button = make("button", { type: "button" }, image);
    button.addEventListener("click", () => open(drawing));
    cell.replaceChildren(button);
  } else if (isFinished(drawing)) {
    cell.replaceChildren(text(drawing.state, { message: drawing.error.message }));
  } else {
    const bar = cell.querySelector("progress");
    if (bar) bar.value = (drawing.live?.step ?? 0) / (drawing.live?.steps ?? 1);
  }
  const isBusy = [...cells.keys()].some((id) => drawings.get(id) && !isFinished(drawings.get(id)));
  if (cells.size === axes.steps.length * axes.guidances.length && !isBusy) $("sheet-cancel").hidden = true;
}

/** Connect the elements; `read` gives the form's request, `open` shows a drawing's recipe. */
export function start(read, open) {
  $("open-sheet").addEventListener("click", () => $("sheet-dialog").showModal());
  $("sheet-close").addEventListener("click", () => $("sheet-dialog").close());
  $("sheet-cancel").addEventListener("click", cancel);
  $("sheet-form").addEventListener("submit", (event) => {
    event.preventDefault();
    draw(read, open);
  });
  drawings.addEventListener("change", ({ detail: drawing }) => render(drawing, open));
  language.addEventListener("change", renderLabels);
}
