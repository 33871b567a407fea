// ComfyUI's clients for Node against a service: node comfyui_node.mjs URL CASE < JSON. Prints one line of JSON.
import { readFileSync } from "node:fs";

const [url, name] = process.argv.slice(2);
const given = JSON.parse(readFileSync(0, "utf8"));

const fetched = async (address) => Buffer.from(await (await fetch(address)).arrayBuffer()).toString("base64");

// --- @saintno/comfyui-sdk ------------------------------------------------------------------------------------------

async function saintno() {
  const { ComfyApi, CallWrapper, PromptBuilder } = await import("@saintno/comfyui-sdk");
  const api = new ComfyApi(url, "saintno-client");
  // Version 0.3.1 says that it is ready before its websocket is open. A workflow that has ended when the first message
  // arrives leaves it waiting for ever: it looks into the history and forgets whom to tell.
  const opened = new Promise((resolve) => api.on("status", resolve));
  await Promise.all([api.init().waitForReady(), opened]);
  const run = async (graph, inputs) => {
    let builder = new PromptBuilder(graph, Object.keys(inputs), ["images"]).setOutputNode("images", "10");
    // Each call gives another builder.
    for (const [key, [place, value]] of Object.entries(inputs)) {
      builder = builder.setInputNode(key, place).input(key, value);
    }
    const said = { progress: [], previews: 0, failed: null, finished: false };
    const wrapper = new CallWrapper(api, builder)
      .onProgress((progress) => said.progress.push([progress.value, progress.max]))
      .onPreview(() => said.previews++)
      .onFinished(() => (said.finished = true))
      .onFailed((error) => (said.failed = { message: error.message, cause: error.cause ?? null }));
    const output = await wrapper.run();
    const images = output ? output.images.images.map((image) => api.getPathImage(image)) : [];
    return { ...said, images: await Promise.all(images.map(fetched)) };
  };
  return { api, run };
}

// --- @stable-canvas/comfyui-client ---------------------------------------------------------------------------------

async function stable() {
  const { Client, Workflow } = await import("@stable-canvas/comfyui-client");
  const { default: WebSocket } = await import("ws");
  const client = new Client({ api_host: new URL(url).host, WebSocket, fetch, clientId: "stable-client" });
  await client.connect();
  return { client, Workflow };
}

// Its pictures are addresses.
const contents = (output) => Promise.all(output.images.map((image) => fetched(image.data)));

const cases = {
  async saintno_draw({ graph, seed }) {
    const { api, run } = await saintno();
    const said = await run(graph, { seed: ["8.inputs.seed", seed] });
    api.destroy();
    return said;
  },
  async saintno_edit({ graph, image }) {
    const { api, run } = await saintno();
    const { info } = await api.uploadImage(Buffer.from(image, "base64"), "from node.png", { overwrite: true });
    const said = await run(graph, { image: ["20.inputs.image", info.filename] });
    api.destroy();
    return { ...said, info };
  },
  async saintno_fails({ graphs }) {
    const { api, run } = await saintno();
    const found = [];
    for (const graph of graphs) found.push((await run(graph, {})).failed);
    api.destroy();
    return { failed: found };
  },
  async saintno_asks() {
    const { api } = await saintno();
    const found = {
      checkpoints: await api.getCheckpoints(),
      samplers: (await api.getSamplerInfo()).sampler[0],
      version: (await api.getSystemStats()).system.comfyui_version,
      histories: Object.keys(await api.getHistories(1)).length,
      embeddings: await api.getEmbeddings(),
    };
    api.destroy();
    return found;
  },
  async stable_draw({ graph }) {
    const { client } = await stable();
    const progress = [];
    const output = await client.enqueue(graph, { progress: ({ value, max }) => progress.push([value, max]) });
    client.close();
    return { images: await contents(output), progress };
  },
  async stable_polls({ graph }) {
    const { client } = await stable();
    const output = await client.enqueue_polling(graph);
    client.close();
    return { images: await contents(output) };
  },
  async stable_builds({ seed }) {
    const { client, Workflow } = await stable();
    const workflow = new Workflow();
    const make = workflow.classes;
    const [unet] = make.UNETLoader({ unet_name: "zimage_nano_bf16.safetensors", weight_dtype: "default" });
    const [model] = make.ModelSamplingAuraFlow({ model: unet, shift: 3 });
    const [clip] = make.CLIPLoader({ clip_name: "qwen3_nano.safetensors", type: "lumina2", device: "default" });
    const [vae] = make.VAELoader({ vae_name: "ae_nano.safetensors" });
    const [positive] = make.CLIPTextEncode({ clip, text: "a panda, green background, flat style" });
    const [negative] = make.ConditioningZeroOut({ conditioning: positive });
    const [latent_image] = make.EmptySD3LatentImage({ width: 256, height: 256, batch_size: 1 });
    const values = { seed, steps: 8, cfg: 1, sampler_name: "res_multistep", scheduler: "simple", denoise: 1 };
    const [samples] = make.KSampler({ model, positive, negative, latent_image, ...values });
    make.SaveImage({ images: make.VAEDecode({ samples, vae })[0], filename_prefix: "stable" });
    const output = await workflow.invoke(client);
    client.close();
    return { images: await contents(output) };
  },
  async stable_asks() {
    const { client } = await stable();
    const found = {
      samplers: await client.getSamplers(),
      schedulers: await client.getSchedulers(),
      vaes: await client.getVAEs(),
      loras: await client.getLoRAs(),
      queue: await client.getQueue(),
    };
    await client.interrupt();
    await client.free({ unload_models: true, free_memory: true });
    client.close();
    return found;
  },
};

const said = await cases[name](given);
// The clients keep timers: the process ends when the line is out.
process.stdout.write(`${JSON.stringify(said)}\n`, () => process.exit(0));
