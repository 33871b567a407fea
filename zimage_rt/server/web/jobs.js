// Drawings on their way and finished ones: sent to the service, followed by its events, kept in the browser.

import * as api from "./api.js";
import { dataUrl } from "./dom.js";
import * as store from "./store.js";

// Drawings that the browser keeps; older ones go.
const MAX_KEPT = 300;
// Previews of one drawing, at most about so many.
const PREVIEWS = 8;
// Milliseconds between two looks at the place in the queue, and before a broken stream is opened again.
const POLL = 1500;

// Streams at once: a browser opens six connections to a service, for all tabs and requests.
const STREAMS = 2;

const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

/** Resolves when the user has given a key. */
const keyGiven = () => new Promise((resolve) => api.access.addEventListener("key", resolve, { once: true }));

/** Places for streams, given in the order of asking. */
class Places {
  #free = STREAMS;
  #waiting = [];

  async take() {
    if (this.#free > 0) this.#free -= 1;
    else await new Promise((resolve) => this.#waiting.push(resolve));
  }

  give() {
    const next = this.#waiting.shift();
    if (next) next();
    else this.#free += 1;
  }
}

/**
 * A drawing: `id` of its job, `created`, `state` (queued, running, done, failed, cancelled), `kind` (draw, edit,
 * refine, sheet), `request`, `inputs` (image and mask as blobs), `blob` (the image's file), `warnings`, `error`.
 * Drawings on their way have `live`: `position`, `step`, `steps`, `preview` (a URL).
 */
class Drawings extends EventTarget {
  #drawings = new Map();
  #urls = new Map();
  #streams = new Places();

  /** Read what the browser keeps, and follow again what was on its way. */
  async load() {
    const kept = (await store.all()).sort((a, b) => b.created - a.created);
    kept.slice(MAX_KEPT).forEach((old) => store.remove(old.id));
    for (const drawing of kept.slice(0, MAX_KEPT).reverse()) {
      this.#drawings.set(drawing.id, drawing);
      if (!isFinished(drawing)) this.#follow(drawing);
    }
  }

  /** The drawing of an id. */
  get(id) {
    return this.#drawings.get(id);
  }

  /** Those that are done, the newest first. */
  get done() {
    return [...this.#drawings.values()].filter((drawing) => drawing.state === "done").reverse();
  }

  /** A URL of a drawing's image, or of one of its inputs. */
  url(drawing, part = "") {
    const name = `${drawing.id}/${part}`;
    if (!this.#urls.has(name)) this.#urls.set(name, URL.createObjectURL(part ? drawing.inputs[part] : drawing.blob));
    return this.#urls.get(name);
  }

  /** Send a request. Throws ServiceError. */
  async submit({ request, inputs = {}, kind = "draw" }) {
    const images = {};
    for (const [part, blob] of Object.entries(inputs)) images[part] = await dataUrl(blob);
    const previews = Math.max(1, Math.ceil((request.num_inference_steps ?? PREVIEWS) / PREVIEWS));
    const job = await api.createJob({ ...request, ...images, previews });
    // A short job may be done before its answer arrives; here it is when its events have been read.
    const drawing = { id: job.id, created: Date.now(), state: "queued", kind, request, inputs, warnings: [] };
    this.#drawings.set(drawing.id, drawing);
    await store.put(drawing).catch(() => {}); // the page works without the browser's storage
    this.#follow(drawing);
    return drawing;
  }

  /** Ask the service to stop a drawing. */
  async cancel(drawing) {
    await api.cancelJob(drawing.id);
  }

  /** Forget a drawing. */
  async remove(drawing) {
    this.#drawings.delete(drawing.id);
    for (const [name, url] of [...this.#urls].filter(([name]) => name.startsWith(`${drawing.id}/`))) {
      URL.revokeObjectURL(url);
      this.#urls.delete(name);
    }
    await store.remove(drawing.id).catch(() => {});
    this.#tell("removed", drawing);
  }

  #tell(name, drawing) {
    this.dispatchEvent(new CustomEvent(name, { detail: drawing }));
  }

  /** Follow a drawing to its end: by its events, and by its status while it waits. */
  async #follow(drawing) {
    Object.defineProperty(drawing, "live", { value: {}, configurable: true }); // not kept
    this.#tell("change", drawing);
    this.#watchQueue(drawing);
    await this.#streams.take();
    try {
      await this.#readEvents(drawing);
    } finally {
      this.#streams.give();
    }
  }

  /** Read a drawing's events to its end, over broken streams. */
  async #readEvents(drawing) {
    drawing.live.isStreaming = true;
    let last = -1;
    while (!isFinished(drawing)) {
      try {
        for await (const event of api.jobEvents(drawing.id, last)) {
          await this.#on(drawing, event);
          last = event.number;
        }
        // The events of a service that began anew are counted anew.
        if (!isFinished(drawing)) await this.#ask(drawing);
      } catch (error) {
        if (error.status === 401) await keyGiven();
        else if (error.status === 404) await this.#ask(drawing);
        else if (error.status) await this.#fail(drawing, error);
      }
      if (!isFinished(drawing)) await pause(POLL);
    }
  }

  async #on(drawing, { name, data }) {
    const { live } = drawing;
    if (name === "queued") {
      drawing.state = "queued";
      live.position = data.position;
    } else if (name === "started") {
      drawing.state = "running";
    } else if (name === "step") {
      Object.assign(live, { step: data.step, steps: data.steps });
      if (data.preview) live.preview = `data:image/jpeg;base64,${data.preview}`;
    } else if (name === "done") {
      await this.#finish(drawing, data.warnings);
      return;
    } else {
      await this.#fail(drawing, data.error, name);
      return;
    }
    this.#tell("change", drawing);
  }

  async #finish(drawing, warnings = []) {
    drawing.blob = await api.jobImage(drawing.id, 0);
    drawing.state = "done";
    drawing.warnings = warnings;
    await store.put(drawing).catch((error) => (drawing.warnings = [...warnings, String(error)]));
    this.#tell("change", drawing);
  }

  async #fail(drawing, error, state = "failed") {
    drawing.state = state;
    drawing.error = { code: error?.code, message: error?.message ?? "" };
    await store.remove(drawing.id).catch(() => {});
    this.#tell("change", drawing);
    this.#drawings.delete(drawing.id);
  }

  /** The end of a drawing whose events the service no longer has; none if it does not answer. */
  async #ask(drawing) {
    try {
      const status = await api.jobStatus(drawing.id);
      if (status.state === "done") await this.#finish(drawing);
      else if (isFinished(status)) await this.#fail(drawing, status.error, status.state);
    } catch (error) {
      if (error.status && error.status !== 401) await this.#fail(drawing, error);
    }
  }

  /** Ask for the place in the queue, which changes without an event, and for the end until events are read. */
  async #watchQueue(drawing) {
    for (;;) {
      await pause(POLL);
      if (drawing.state !== "queued") return;
      const status = await api.jobStatus(drawing.id).catch(() => null);
      if (drawing.state !== "queued" || !status) continue;
      if (isFinished(status) && !drawing.live.isStreaming) {
        await this.#ask(drawing);
      } else if (Number.isInteger(status.position) && status.position !== drawing.live.position) {
        drawing.live.position = status.position;
        this.#tell("change", drawing);
      }
    }
  }
}

/** Whether a drawing is done, failed or cancelled. */
export const isFinished = (drawing) => ["done", "failed", "cancelled"].includes(drawing.state);

/** All drawings; fires `change` and `removed` with the drawing as `detail`. */
export const drawings = new Drawings();
