// Driver of transformers.js in Node: AutoModelForCausalLM and its generate().

import { basename, dirname } from "node:path";
import { AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList, Tensor, env } from "@huggingface/transformers";
import { decisions, each, padded, serve } from "./jobs.mjs";

env.allowRemoteModels = false;

class Recorder extends LogitsProcessor {
  seen = [];
  _call(ids, logits) {
    this.seen.push(logits.tolist());
    return logits;
  }
}

async function open(job) {
  env.localModelPath = dirname(job.folder);
  return AutoModelForCausalLM.from_pretrained(basename(job.folder)); // config.json says dtype and external data
}

async function run(job, rows) {
  const model = await open(job);
  const { ids, mask } = padded(rows, job.pad);
  const tensor = (lists) => new Tensor("int64", lists.flat().map(BigInt), [lists.length, lists[0].length]);
  const recorder = new Recorder();
  const processors = new LogitsProcessorList();
  processors.push(recorder);
  const out = await model.generate({
    input_ids: tensor(ids),
    attention_mask: tensor(mask),
    max_new_tokens: job.steps,
    do_sample: false,
    logits_processor: processors,
    return_dict_in_generate: true,
  });
  await model.dispose();
  return {
    sequences: out.sequences.tolist().map((row) => ended(row.slice(ids[0].length).map(Number), job)),
    logits: recorder.seen,
    decisions: decisions(job.state, out.past_key_values, rows.length),
  };
}

// transformers.js goes on with rows that have ended until all have; generate() of Transformers pads them.
function ended(row, job) {
  const end = row.indexOf(job.end);
  return end < 0 ? row : row.map((id, at) => (at > end ? job.pad : id));
}

await serve({ batch: (job) => run(job, job.rows), single: (job) => each(run, job) });
