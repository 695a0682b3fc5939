// Driver of onnxruntime-web: its WebAssembly, in Node, and a loop of our own.

import { readFile } from "node:fs/promises";
import { join } from "node:path";
import * as ort from "onnxruntime-web/wasm";
import { decisions, each, padded, serve } from "./jobs.mjs";

ort.env.wasm.numThreads = 1;
const quiet = { logSeverityLevel: 3 }; // each overridable initialiser is a warning

async function open(job) {
  const folder = join(job.folder, "onnx");
  const externalData = [{ path: "model.onnx_data", data: await readFile(join(folder, "model.onnx_data")) }];
  return ort.InferenceSession.create(await readFile(join(folder, "model.onnx")), { externalData, ...quiet });
}

async function run(job, rows) {
  const session = await open(job);
  const int64 = (lists) => new ort.Tensor("int64", BigInt64Array.from(lists.flat(), BigInt), [lists.length, lists[0].length]);
  let { ids, mask } = padded(rows, job.pad);
  let cache = emptyCache(session, rows.length);
  const chosen = rows.map(() => []);
  const logits = [];
  const over = (row) => row.includes(job.end);
  while (logits.length < job.steps && !chosen.every(over)) {
    const feeds = { ...cache, input_ids: int64(ids), attention_mask: int64(mask) };
    if (session.inputNames.includes("position_ids")) feeds.position_ids = int64(positions(mask, ids[0].length));
    const out = await session.run(feeds);
    const last = lastLogits(out.logits);
    logits.push(last);
    ids = last.map((row, at) => [over(chosen[at]) ? job.pad : row.indexOf(Math.max(...row))]);
    ids.forEach(([id], at) => chosen[at].push(id));
    mask = mask.map((row) => [...row, 1]);
    cache = Object.fromEntries(Object.keys(cache).map((name) => [name, out[name.replace("past_key_values", "present")]]));
  }
  await session.release();
  return { sequences: chosen, logits, decisions: decisions(job.state, cache, rows.length) };
}

// Of the last `count` tokens: how many valid ones stand before each.
function positions(mask, count) {
  return mask.map((row) => row.map((_, at) => row.slice(0, at).filter((valid) => valid).length).slice(-count));
}

function emptyCache(session, rows) {
  const caches = session.inputMetadata.filter(({ name }) => name.startsWith("past_key_values"));
  return Object.fromEntries(
    caches.map(({ name, shape }) => [name, new ort.Tensor("float32", [], [rows, shape[1], 0, shape[3]])]),
  );
}

function lastLogits({ data, dims: [rows, tokens, size] }) {
  return Array.from({ length: rows }, (_, row) => [...data.subarray(((row + 1) * tokens - 1) * size, (row + 1) * tokens * size)]);
}

await serve({ batch: (job) => run(job, job.rows), single: (job) => each(run, job) });
