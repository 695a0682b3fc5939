// The model: Transformers.js loads tokenizer and graph, the loop over the graph's calls is here. Knows nothing of the page.
//
// Both answers come from one session: each has a KV cache of its own, and its own steering_strength with every call.

import { AutoModelForCausalLM, AutoTokenizer, Tensor, env } from "./vendor/transformers.min.js";

const vendored = (name) => new URL(`vendor/${name}`, import.meta.url).href;
env.allowLocalModels = true;
env.allowRemoteModels = false;
env.useBrowserCache = false; // its keys are addresses, and another export may be served from this one tomorrow
env.useWasmCache = false;
env.fetch = fetched;
env.backends.onnx.wasm.wasmPaths = {
  mjs: vendored("ort-wasm-simd-threaded.mjs"),
  wasm: vendored("ort-wasm-simd-threaded.wasm"),
};

let model, tokenizer, stopped;

const jobs = {
  async load() {
    tokenizer = await AutoTokenizer.from_pretrained(".");
    const template = await fetched("chat_template.jinja"); // where Transformers has it first; Transformers.js does not look
    if (template.ok) tokenizer.chat_template = await template.text();
    model = await AutoModelForCausalLM.from_pretrained(".", {
      device: "wasm",
      dtype: "fp32", // of the file's name only: model_dial.onnx, without a suffix
      model_file_name: "model_dial",
      use_external_data_format: false, // it would look for model_dial.onnx_data
      session_options: { externalData: [{ path: "model.onnx_data", data: "onnx/model.onnx_data" }] },
    });
    const { strength, threshold, start, layers, gate } = model.config.adaras;
    postMessage({ kind: "ready", strength, threshold, start, layers, gated: gate !== null, example: await example() });
  },
  async generate({ prompt, strength, threshold, newTokens }) {
    const ids = encode(prompt);
    const ends = new Set([model.generation_config?.eos_token_id ?? model.config.eos_token_id].flat());
    const rows = [new Row("base", ids, 0, threshold), new Row("steered", ids, strength, threshold)];
    stopped = false;
    try {
      for (let step = 0; step < newTokens && !stopped; step += 1) {
        for (const row of rows.filter(({ over }) => !over)) {
          const id = await row.next();
          if (step === 0 && row.decision) postMessage({ kind: "decision", ...row.decision, column: row.column });
          row.over = ends.has(id) || step + 1 === newTokens;
          postMessage({ kind: "token", column: row.column, id, text: row.text(), perSecond: row.perSecond() });
        }
        await new Promise((resolve) => setTimeout(resolve)); // lets "stop" in
      }
    } finally {
      for (const row of rows) row.dispose();
    }
    postMessage({ kind: "done", stopped });
  },
  stop() {
    stopped = true;
  },
};

onmessage = async ({ data }) => {
  try {
    await jobs[data.kind](data);
  } catch (error) {
    postMessage({ kind: "failed", message: String(error?.message ?? error) });
  }
};

// A question that the rule was evaluated on, where the export has an evaluation, and where `encode` would ask it as it was asked.
async function example() {
  const evaluation = await fetched("evaluation.json");
  const asked = evaluation.ok ? (await evaluation.json()).example : null;
  const text = tokenizer.chat_template ? asked?.[0]?.content : asked;
  return typeof text === "string" ? text : null;
}

const bytes = { kind: "progress", loaded: 0, total: 0 };

// Asks the server whether a copy that the browser has is still right, and reports how much has come.
async function fetched(address, how) {
  const response = await fetch(address, { ...how, cache: "no-cache" });
  bytes.total += Number(response.headers.get("content-length"));
  const count = new TransformStream({
    transform(piece, controller) {
      bytes.loaded += piece.length;
      postMessage(bytes);
      controller.enqueue(piece);
    },
  });
  return new Response(response.body?.pipeThrough(count), response);
}

function encode(prompt) {
  if (!tokenizer.chat_template) return tokenizer.encode(prompt);
  const chat = [{ role: "user", content: prompt }];
  return tokenizer.apply_chat_template(chat, { add_generation_prompt: true, return_tensor: false, return_dict: false });
}

const tensor = (type, data, shape) => new Tensor(type, data, shape).ort_tensor;
const int64 = (numbers) => tensor("int64", BigInt64Array.from(numbers, BigInt), [1, numbers.length]);

// One answer: the tokens so far, and the KV cache of all but the last one.
class Row {
  constructor(column, prompt, strength, threshold) {
    Object.assign(this, { column, strength, threshold, unread: prompt, read: 0, ids: [], milliseconds: 0 });
    this.session = model.sessions.model;
    const caches = this.session.inputMetadata.filter(({ name }) => name.startsWith("past_key_values."));
    this.cache = Object.fromEntries(
      caches.map(({ name, type, shape }) => [name, tensor(type, [], [1, shape[1], 0, shape[3]])]),
    );
    this.gate = this.session.inputNames.includes("steering_threshold") ? caches.length / 2 - 1 : null;
  }

  // The next token's id.
  async next() {
    const began = performance.now();
    const length = this.read + this.unread.length;
    const own = {
      input_ids: int64(this.unread),
      attention_mask: int64(Array(length).fill(1)),
      position_ids: int64(this.unread.map((_, at) => this.read + at)),
      steering_strength: tensor("float32", [this.strength], []),
      steering_threshold: tensor("float32", [this.threshold], []),
    };
    const { inputNames } = this.session;
    const feeds = Object.fromEntries(Object.entries(own).filter(([name]) => inputNames.includes(name)));
    const { logits, ...present } = await this.session.run({ ...feeds, ...this.cache });
    this.dispose();
    for (const one of Object.values(own)) one.dispose();
    this.cache = Object.fromEntries(
      Object.entries(present).map(([name, one]) => [name.replace("present", "past_key_values"), one]),
    );
    this.decision ??= this.gate === null ? null : this.#decision();
    const id = argmax(logits.data, logits.dims[2]);
    logits.dispose();
    this.ids.push(id);
    this.read = length;
    this.unread = [id];
    this.milliseconds += performance.now() - began;
    return id;
  }

  text() {
    const text = tokenizer.decode(this.ids, { skip_special_tokens: true });
    return this.over ? text : text.replace(/\uFFFD+$/, ""); // the first bytes of a letter
  }

  perSecond() {
    return (1000 * this.ids.length) / this.milliseconds;
  }

  dispose() {
    for (const one of Object.values(this.cache)) one.dispose();
  }

  // What the gate left in its layer of the KV cache: p(correct), and 1 where the row is steered.
  #decision() {
    const [steered, probability] = ["key", "value"].map((part) => this.cache[`past_key_values.${this.gate}.${part}`].data[0]);
    return { probability, steered: steered === 1 };
  }
}

// Where the last of several rows is largest.
function argmax(numbers, size) {
  const first = numbers.length - size;
  let best = first;
  for (let at = first + 1; at < numbers.length; at += 1) if (numbers[at] > numbers[best]) best = at;
  return best - first;
}
