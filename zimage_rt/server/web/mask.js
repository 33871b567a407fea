// The mask editor: strokes over an image, by pointer or keyboard. A mask is white where the image is drawn anew.

import { $, announce } from "./dom.js";
import { text } from "./texts.js";

// Pixels of a mask's longer side at most; the service fits it to the image.
const MAX_SIDE = 2048;
const KEYS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
// Parts of the shorter side that the brush moves by an arrow key, and with Shift.
const [STEP, LONG_STEP] = [0.02, 0.1];

let editor = null;

/**
 * Let the user paint over an image of a size. Resolves to `{mask, strokes}`, the mask null if nothing is painted, or to
 * null if it was given up.
 */
export function paintMask(image, width, height, strokes) {
  return new Promise((resolve) => {
    editor?.end(null);
    editor = new Editor(image, width, height, strokes, resolve);
  });
}

class Editor {
  #strokes;
  #resolve;
  #canvas = $("mask-canvas");
  #context = this.#canvas.getContext("2d", { willReadFrequently: true });
  #at; // the brush, in pixels of the canvas
  #isDown = false;
  #url;

  constructor(image, width, height, strokes, resolve) {
    const scale = Math.min(1, MAX_SIDE / Math.max(width, height));
    this.#canvas.width = Math.max(1, Math.round(width * scale));
    this.#canvas.height = Math.max(1, Math.round(height * scale));
    this.#strokes = [...strokes];
    this.#resolve = resolve;
    this.#at = [this.#canvas.width / 2, this.#canvas.height / 2];
    this.#url = URL.createObjectURL(image);
    $("mask-image").src = this.#url;
    $("canvas-box").style.setProperty("--ratio", width / height);
    document.querySelector("input[name=tool][value=brush]").checked = true;
    this.#redraw();
    $("ring").hidden = true;
    $("mask-dialog").showModal();
    this.#canvas.focus();
  }

  // --- drawing ---

  get #radius() {
    return (Number($("brush-size").value) / 200) * Math.min(this.#canvas.width, this.#canvas.height);
  }

  get #tool() {
    return document.querySelector("input[name=tool]:checked").value;
  }

  /** Begin a stroke at the brush. */
  #lower() {
    this.#isDown = true;
    this.#add({ kind: this.#tool, radius: this.#radius, points: [this.#at] });
  }

  #lift() {
    this.#isDown = false;
  }

  #moveTo(point) {
    this.#at = point;
    this.#showRing();
    if (!this.#isDown) return;
    const stroke = this.#strokes.at(-1);
    stroke.points.push(point);
    this.#line(stroke, stroke.points.slice(-2));
  }

  #add(stroke) {
    this.#strokes.push(stroke);
    this.#apply(stroke);
  }

  #apply(stroke) {
    const { width, height } = this.#canvas;
    const context = this.#context;
    if (stroke.kind === "brush" || stroke.kind === "erase") {
      this.#line(stroke, stroke.points);
    } else if (stroke.kind === "clear") {
      context.clearRect(0, 0, width, height);
    } else if (stroke.kind === "all") {
      this.#fill("source-over");
    } else if (stroke.kind === "invert") {
      this.#fill("xor");
    } else {
      context.drawImage(stroke.bitmap, 0, 0, width, height);
      const pixels = context.getImageData(0, 0, width, height);
      for (let i = 0; i < pixels.data.length; i += 4) pixels.data[i + 3] = pixels.data[i];
      context.putImageData(pixels, 0, 0);
      this.#fill("source-in");
    }
  }

  #fill(operation) {
    this.#context.globalCompositeOperation = operation;
    this.#context.fillStyle = this.#colour;
    this.#context.fillRect(0, 0, this.#canvas.width, this.#canvas.height);
    this.#context.globalCompositeOperation = "source-over";
  }

  get #colour() {
    return getComputedStyle(document.body).getPropertyValue("--mark");
  }

  #line(stroke, points) {
    const context = this.#context;
    context.globalCompositeOperation = stroke.kind === "erase" ? "destination-out" : "source-over";
    context.strokeStyle = this.#colour;
    context.lineWidth = 2 * stroke.radius;
    context.lineCap = context.lineJoin = "round";
    context.beginPath();
    context.moveTo(...points[0]);
    // A line of no length would be no dot in some browsers.
    for (const [x, y] of points) context.lineTo(x + 0.01, y);
    context.stroke();
    context.globalCompositeOperation = "source-over";
  }

  #redraw() {
    this.#context.clearRect(0, 0, this.#canvas.width, this.#canvas.height);
    for (const stroke of this.#strokes) this.#apply(stroke);
  }

  #showRing() {
    const ring = $("ring");
    const scale = this.#canvas.clientWidth / this.#canvas.width;
    ring.hidden = false;
    ring.style.width = ring.style.height = `${2 * this.#radius * scale}px`;
    ring.style.left = `${this.#at[0] * scale}px`;
    ring.style.top = `${this.#at[1] * scale}px`;
    ring.classList.toggle("down", this.#isDown);
  }

  // --- what the user does ---

  undo() {
    this.#strokes.pop();
    this.#lift();
    this.#redraw();
  }

  whole(kind) {
    this.#lift();
    this.#add({ kind });
  }

  resize() {
    this.#showRing();
  }

  pointer(event) {
    const box = this.#canvas.getBoundingClientRect();
    const scale = this.#canvas.width / box.width;
    const point = [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
    if (event.type === "pointerdown" && event.button === 0) {
      this.#canvas.setPointerCapture(event.pointerId);
      this.#at = point;
      this.#lower();
    } else if (event.type === "pointerup" || event.type === "pointercancel") {
      this.#lift();
    }
    this.#moveTo(point);
  }

  key(event) {
    const { width, height } = this.#canvas;
    const move = KEYS[event.key];
    const isCommand = event.ctrlKey || event.metaKey;
    if (isCommand && event.key.toLowerCase() === "z") this.undo();
    else if (isCommand || event.altKey) return;
    else if (move) {
      const step = (event.shiftKey ? LONG_STEP : STEP) * Math.min(width, height);
      const [x, y] = this.#at.map((value, axis) => value + move[axis] * step);
      this.#moveTo([Math.min(width, Math.max(0, x)), Math.min(height, Math.max(0, y))]);
    } else if (event.key === " ") {
      if (this.#isDown) this.#lift();
      else this.#lower();
      this.#showRing();
      announce(text(this.#isDown ? "brushDown" : "brushUp"));
    } else if (event.key === "Enter") {
      this.#lower();
      this.#lift();
      this.#showRing();
    } else if (event.key === "[" || event.key === "]") {
      $("brush-size").value = Number($("brush-size").value) + (event.key === "]" ? 2 : -2);
      this.#showRing();
    } else if ("be".includes(event.key.toLowerCase()) && event.key.length === 1) {
      const tool = event.key.toLowerCase() === "b" ? "brush" : "erase";
      document.querySelector(`input[name=tool][value=${tool}]`).checked = true;
      this.#lift();
    } else return;
    event.preventDefault();
  }

  /** The mask as a PNG, white where painted; null if nothing is. */
  async #mask() {
    const { width, height } = this.#canvas;
    const pixels = this.#context.getImageData(0, 0, width, height);
    const values = pixels.data;
    let isPainted = false;
    for (let i = 0; i < values.length; i += 4) {
      const value = values[i + 3] >= 128 ? 255 : 0;
      isPainted ||= value > 0;
      values[i] = values[i + 1] = values[i + 2] = value;
      values[i + 3] = 255;
    }
    if (!isPainted) return null;
    const canvas = new OffscreenCanvas(width, height);
    canvas.getContext("2d").putImageData(pixels, 0, 0);
    return canvas.convertToBlob({ type: "image/png" });
  }

  async done() {
    const mask = await this.#mask();
    this.end({ mask, strokes: mask ? this.#strokes : [] });
  }

  end(result) {
    if (editor !== this) return;
    editor = null;
    $("mask-dialog").close();
    URL.revokeObjectURL(this.#url);
    this.#resolve(result);
  }
}

/** Connect the elements. */
export function start() {
  const canvas = $("mask-canvas");
  for (const name of ["pointerdown", "pointermove", "pointerup", "pointercancel"]) {
    canvas.addEventListener(name, (event) => editor?.pointer(event));
  }
  canvas.addEventListener("pointerleave", () => ($("ring").hidden = true));
  canvas.addEventListener("keydown", (event) => editor?.key(event));
  canvas.addEventListener("focus", () => canvas.matches(":focus-visible") && editor?.resize());
  $("brush-size").addEventListener("input", () => editor?.resize());
  $("mask-undo").addEventListener("click", () => editor?.undo());
  $("mask-all").addEventListener("click", () => editor?.whole("all"));
  $("mask-invert").addEventListener("click", () => editor?.whole("invert"));
  $("mask-clear").addEventListener("click", () => editor?.whole("clear"));
  $("mask-done").addEventListener("click", () => editor?.done());
  $("mask-cancel").addEventListener("click", () => editor?.end(null));
  $("mask-dialog").addEventListener("cancel", (event) => {
    event.preventDefault();
    editor?.end(null);
  });
}
