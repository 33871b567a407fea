// Small helpers for the document. Text from the service goes in as text alone, never as markup.

/** The element of an id. */
export const $ = (id) => document.getElementById(id);

/** A new element with properties, `data-` values under `dataset`, and children. */
export function make(tag, { dataset = {}, ...properties } = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  Object.assign(element.dataset, dataset);
  element.append(...children);
  return element;
}

/** Show an element with a text, or hide it without one. */
export function say(element, text) {
  element.textContent = text ?? "";
  element.hidden = !text;
}

/** Make a list's items those that are given, in their order; items that stay keep the focus. */
export function arrange(list, items) {
  for (const old of [...list.children]) if (!items.includes(old)) old.remove();
  items.forEach((item, index) => {
    if (list.children[index] !== item) list.insertBefore(item, list.children[index] ?? null);
  });
}

let last = "";

/** Have a screen reader say a text, once. */
export function announce(text) {
  if (text !== last) $("status").textContent = last = text;
}

/** A file as a data URL. */
export function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}

/** Put a text on the clipboard; pages of plain http from another machine have no clipboard of their own. */
export async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = make("textarea", { value: text, className: "unseen" });
  (document.querySelector("dialog[open]") ?? document.body).append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}

/** A value of the browser's storage as JSON; null without one. */
export function recall(name) {
  try {
    return JSON.parse(localStorage.getItem(`zimage.${name}`));
  } catch {
    return null;
  }
}

/** Keep a value in the browser's storage. */
export function remember(name, value) {
  localStorage.setItem(`zimage.${name}`, JSON.stringify(value));
}
