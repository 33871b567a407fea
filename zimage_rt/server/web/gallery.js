// The gallery of what was drawn, and the recipe of one image.

import { $, announce, arrange, copy, make, say } from "./dom.js";
import { drawings } from "./jobs.js";
import { asCommand, asJson, fileName } from "./recipe.js";
import { language, text } from "./texts.js";

let open = null;

function item(drawing, old) {
  const { prompt, width, height } = drawing.request;
  const source = drawings.url(drawing);
  const image = old?.querySelector("img") ?? make("img", { loading: "lazy", src: source, width, height });
  image.alt = text("altImage", { prompt });
  if (old) return old;
  const button = make("button", { type: "button", title: prompt }, image);
  button.addEventListener("click", () => openDetails(drawing));
  return make("li", { dataset: { id: drawing.id } }, button);
}

function render() {
  const found = drawings.done;
  $("gallery-section").hidden = found.length === 0;
  say($("gallery-count"), found.length === 1 ? text("image") : text("images", { count: found.length }));
  const old = new Map([...$("gallery").children].map((each) => [each.dataset.id, each]));
  arrange($("gallery"), found.map((drawing) => item(drawing, old.get(drawing.id))));
}

/** Show a drawing's recipe. */
export function openDetails(drawing) {
  open = drawing;
  $("details-image").src = drawings.url(drawing);
  $("details-image").alt = text("altImage", { prompt: drawing.request.prompt });
  say($("details-prompt"), drawing.request.prompt);
  say($("recipe-command"), asCommand(drawing));
  say($("recipe-json"), asJson(drawing));
  Object.assign($("details-download"), { href: drawings.url(drawing), download: fileName(drawing) });
  for (const part of ["image", "mask"]) {
    const link = $(part === "image" ? "details-input" : "details-mask");
    link.hidden = !drawing.inputs[part];
    if (!link.hidden) Object.assign(link, { href: drawings.url(drawing, part), download: fileName(drawing, part) });
  }
  if (!$("details-dialog").open) $("details-dialog").showModal();
}

/** Connect the elements; `actions` has `continueFrom`, `repeat` and `use`, each called with a drawing. */
export function start(actions) {
  const close = () => $("details-dialog").close();
  const closing = (action) => () => {
    close();
    document.querySelectorAll("dialog[open]").forEach((dialog) => dialog.close());
    action(open);
  };
  $("details-continue").addEventListener("click", closing(actions.continueFrom));
  $("details-repeat").addEventListener("click", closing(actions.repeat));
  $("details-use").addEventListener("click", closing(actions.use));
  $("details-delete").addEventListener("click", closing((drawing) => drawings.remove(drawing)));
  $("details-close").addEventListener("click", close);
  for (const [id, source] of [["copy-command", "recipe-command"], ["copy-json", "recipe-json"]]) {
    $(id).addEventListener("click", async () => {
      await copy($(source).textContent);
      $(id).textContent = text("copied");
      announce(text("copied"));
      setTimeout(() => ($(id).textContent = text("copy")), 1500);
    });
  }
  drawings.addEventListener("change", ({ detail: drawing }) => drawing.state === "done" && render());
  drawings.addEventListener("removed", render);
  language.addEventListener("change", render);
  render();
}
