// OpenAI's own client for Node against a service: node openai_node.mjs URL CASE < JSON, with the images in base64.
// Prints one line of JSON.
import { readFileSync } from "node:fs";
import OpenAI, { toFile } from "openai";

const [url, name] = process.argv.slice(2);
const given = JSON.parse(readFileSync(0, "utf8"));
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: given.maxRetries ?? 0 });
const png = async (base64, file) => toFile(Buffer.from(base64, "base64"), file, { type: "image/png" });

const cases = {
  async generate({ fields }) {
    const answer = await client.images.generate(fields);
    return { images: answer.data.map((image) => image.b64_json), size: answer.size, usage: answer.usage };
  },
  async edit({ image, mask, fields }) {
    const files = { image: await png(image, "image.png"), mask: await png(mask, "mask.png") };
    const answer = await client.images.edit({ ...files, ...fields });
    return { images: answer.data.map((each) => each.b64_json) };
  },
  async stream({ fields }) {
    const events = [];
    for await (const event of await client.images.generate({ ...fields, stream: true })) {
      events.push({ type: event.type, index: event.partial_image_index, image: event.b64_json });
    }
    return { events };
  },
  async models() {
    const names = [];
    for await (const model of client.models.list()) names.push(model.id);
    return { names };
  },
};

try {
  console.log(JSON.stringify(await cases[name](given)));
} catch (error) {
  const { status, code, param, message } = error;
  console.log(JSON.stringify({ error: { kind: error.constructor.name, status, code, param, message } }));
}
