// The service's protocol: JSON, images and server-sent events, with the key that the service may ask for.

import { recall, remember } from "./dom.js";

/** An answer that is an error: `param` names the field at fault. */
export class ServiceError extends Error {
  constructor(message, { status = 0, code = "", param = null, retryAfter = 0 } = {}) {
    super(message);
    Object.assign(this, { status, code, param, retryAfter });
  }
}

/** Fires `unauthorized` when the service asks for a key, and `key` when the user gave one. */
export const access = new EventTarget();

/** Keep the key that later requests send. */
export function useKey(key) {
  remember("key", key);
  access.dispatchEvent(new Event("key"));
}

async function call(path, { headers = {}, ...options } = {}) {
  const key = recall("key");
  const all = key ? { ...headers, Authorization: `Bearer ${key}` } : headers;
  let answer;
  try {
    answer = await fetch(new URL(path, document.baseURI), { ...options, headers: all });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServiceError("", { code: "unreachable" });
  }
  if (answer.ok) return answer;
  const body = await answer.json().catch(() => null);
  if (answer.status === 401) access.dispatchEvent(new Event("unauthorized"));
  throw new ServiceError(body?.error?.message ?? `${answer.status} ${answer.statusText}`, {
    status: answer.status,
    code: body?.error?.code ?? "",
    param: body?.error?.param ?? null,
    retryAfter: Number(answer.headers.get("retry-after")) || 0,
  });
}

/** The models that the service draws with. */
export async function models() {
  return (await (await call("v1/models")).json()).data;
}

/** Let a request wait; the job. */
export async function createJob(body) {
  const headers = { "Content-Type": "application/json" };
  return (await call("v1/jobs", { method: "POST", headers, body: JSON.stringify(body) })).json();
}

/** A job's status. */
export async function jobStatus(id) {
  return (await call(`v1/jobs/${id}`)).json();
}

/** Cancel a job. */
export async function cancelJob(id) {
  return (await call(`v1/jobs/${id}`, { method: "DELETE" })).json();
}

/** A finished image's file. */
export async function jobImage(id, number) {
  return (await call(`v1/jobs/${id}/images/${number}`)).blob();
}

/** A job's events after number `since`, as they come: `{number, name, data}`. */
export async function* jobEvents(id, since = -1) {
  // EventSource cannot send a key.
  const headers = since < 0 ? {} : { "Last-Event-ID": String(since) };
  const answer = await call(`v1/jobs/${id}/events`, { headers });
  let text = "";
  for await (const chunk of chunks(answer.body.pipeThrough(new TextDecoderStream()))) {
    text += chunk;
    const blocks = text.split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const event = parseEvent(block);
      if (event) yield event;
    }
  }
}

async function* chunks(stream) {
  const reader = stream.getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      yield value;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function parseEvent(block) {
  const fields = {};
  for (const line of block.split("\n")) {
    const colon = line.indexOf(": ");
    if (colon > 0) fields[line.slice(0, colon)] = line.slice(colon + 2);
  }
  if (!fields.data) return null;
  return { number: Number(fields.id), name: fields.event, data: JSON.parse(fields.data) };
}
