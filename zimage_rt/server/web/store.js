// What was drawn, in the browser's IndexedDB: requests, input images and results outlive the service's own copies.

const NAME = "zimage";
const DRAWINGS = "drawings";

let opened = null;

function open() {
  opened ??= new Promise((resolve, reject) => {
    const request = indexedDB.open(NAME, 1);
    request.onupgradeneeded = () => request.result.createObjectStore(DRAWINGS, { keyPath: "id" });
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
  return opened;
}

async function run(mode, work) {
  const database = await open();
  return new Promise((resolve, reject) => {
    const transaction = database.transaction(DRAWINGS, mode);
    const request = work(transaction.objectStore(DRAWINGS));
    transaction.oncomplete = () => resolve(request.result);
    transaction.onabort = () => reject(transaction.error);
  });
}

/** All drawings. */
export const all = () => run("readonly", (drawings) => drawings.getAll());

/** Keep a drawing. */
export const put = (drawing) => run("readwrite", (drawings) => drawings.put(drawing));

/** Forget a drawing. */
export const remove = (id) => run("readwrite", (drawings) => drawings.delete(id));
