// A drawing's recipe: the request as JSON, and the command that draws it again.

const ENDINGS = { "image/png": "png", "image/jpeg": "jpg", "image/webp": "webp" };

/** The name under which a drawing's file, or an input of it, is downloaded. */
export function fileName(drawing, part = "") {
  const blob = part ? drawing.inputs[part] : drawing.blob;
  const name = part || `zimage-${drawing.request.seed}-${drawing.id.slice(0, 6)}`;
  return `${name}.${ENDINGS[blob?.type] ?? "png"}`;
}

function inputNames(drawing) {
  return Object.fromEntries(Object.keys(drawing.inputs).map((part) => [part, fileName(drawing, part)]));
}

/** The request as JSON; input images by the names of their files. */
export function asJson(drawing) {
  return JSON.stringify({ ...drawing.request, ...inputNames(drawing) }, null, 2);
}

const quote = (text) => (/^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", `'\\''`)}'`);

/** The command of the shell. */
export function asCommand(drawing) {
  const { request } = drawing;
  const words = ["zimage generate", quote(`engines/${request.model}`), "-p", quote(request.prompt)];
  const options = {
    "--negative-prompt": request.negative_prompt,
    "--width": request.width,
    "--height": request.height,
    "--steps": request.num_inference_steps,
    "--guidance-scale": request.guidance_scale,
    "--seed": request.seed,
    "--image": inputNames(drawing).image,
    "--mask": inputNames(drawing).mask,
    "--strength": drawing.inputs.image && request.strength,
  };
  for (const [name, value] of Object.entries(options)) {
    if (value !== undefined && value !== "") words.push(name, quote(String(value)));
  }
  for (const [name, weight] of Object.entries(request.loras ?? {})) {
    words.push("--lora", quote(`${name}.safetensors=${weight}`));
  }
  return words.join(" ");
}
