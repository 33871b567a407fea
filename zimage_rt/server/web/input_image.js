// The image to begin with, and the mask on it.

import { $, say } from "./dom.js";
import { paintMask } from "./mask.js";
import { text } from "./texts.js";

// Pixels of the thumbnail's longer side.
const THUMBNAIL = 720;
const [PLAIN_STRENGTH, MASK_STRENGTH] = [0.6, 1];

let chosen = null; // { image, mask, strokes, width, height, isTurn }
let onSize = () => {};

/** What is chosen: `image`, `mask` (null without one) and `isTurn`; null without an image. */
export const input = () => chosen;

/** The inputs of a request: blobs by their fields. */
export function inputs() {
  if (!chosen) return {};
  return chosen.mask ? { image: chosen.image, mask: chosen.mask } : { image: chosen.image };
}

/** How far to go from the image. */
export const strength = () => Number($("strength").value);

/** Choose an image, with a mask if there is one; false if it is none. */
export async function choose(image, { mask = null, isTurn = false } = {}) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(image);
  } catch {
    document.dispatchEvent(new CustomEvent("field-error", { detail: { param: "image", message: text("notAnImage") } }));
    return false;
  }
  const strokes = mask ? [{ kind: "bitmap", bitmap: await createImageBitmap(mask) }] : [];
  chosen = { image, mask, strokes, isTurn, bitmap, width: bitmap.width, height: bitmap.height };
  setStrength(mask ? MASK_STRENGTH : PLAIN_STRENGTH);
  onSize(chosen.width, chosen.height);
  await show();
  return true;
}

/** Begin with noise again. */
export async function forget() {
  chosen = null;
  await show();
}

/** Let the user paint the mask; false if it was given up. */
export async function paint() {
  const painted = await paintMask(chosen.image, chosen.width, chosen.height, chosen.strokes);
  if (!painted) return false;
  Object.assign(chosen, painted);
  setStrength(painted.mask ? MASK_STRENGTH : PLAIN_STRENGTH);
  await show();
  return true;
}

export function setStrength(value) {
  $("strength").value = value;
  say($("strength-value"), String(Number($("strength").value)));
}

async function show() {
  $("drop").hidden = Boolean(chosen);
  $("chosen").hidden = !chosen;
  if (!chosen) return;
  const canvas = $("chosen-image");
  const scale = Math.min(1, THUMBNAIL / Math.max(chosen.width, chosen.height));
  canvas.width = Math.max(1, Math.round(chosen.width * scale));
  canvas.height = Math.max(1, Math.round(chosen.height * scale));
  const context = canvas.getContext("2d");
  context.drawImage(chosen.bitmap, 0, 0, canvas.width, canvas.height);
  if (!chosen.mask) return;
  // White as the accent colour, black as nothing.
  const marks = new OffscreenCanvas(canvas.width, canvas.height);
  const tint = marks.getContext("2d");
  tint.drawImage(await createImageBitmap(chosen.mask), 0, 0, canvas.width, canvas.height);
  const pixels = tint.getImageData(0, 0, canvas.width, canvas.height);
  for (let i = 0; i < pixels.data.length; i += 4) pixels.data[i + 3] = pixels.data[i];
  tint.putImageData(pixels, 0, 0);
  tint.globalCompositeOperation = "source-in";
  tint.fillStyle = getComputedStyle(document.body).getPropertyValue("--mark");
  tint.fillRect(0, 0, canvas.width, canvas.height);
  context.globalAlpha = 0.6;
  context.drawImage(marks, 0, 0);
  context.globalAlpha = 1;
}

/** Connect the elements; `sized` is told the size of an image that is chosen. */
export function start(sized) {
  onSize = sized;
  setStrength(PLAIN_STRENGTH);
  $("choose").addEventListener("click", () => $("file").click());
  $("file").addEventListener("change", async () => {
    const [file] = $("file").files;
    $("file").value = "";
    if (file && (await choose(file))) $("paint").focus();
  });
  $("paint").addEventListener("click", paint);
  $("remove-image").addEventListener("click", async () => {
    await forget();
    $("choose").focus();
  });
  $("strength").addEventListener("input", () => setStrength($("strength").value));
  document.addEventListener("paste", (event) => {
    const file = [...event.clipboardData.files].find((each) => each.type.startsWith("image/"));
    if (file) choose(file);
  });
  for (const name of ["dragover", "dragleave", "drop"]) {
    document.addEventListener(name, (event) => {
      if (!event.dataTransfer?.types.includes("Files")) return;
      event.preventDefault();
      document.body.classList.toggle("dropping", name === "dragover");
      if (name === "drop" && event.dataTransfer.files[0]) choose(event.dataTransfer.files[0]);
    });
  }
}
