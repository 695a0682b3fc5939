// What the drivers in JavaScript share; see ../drivers/greedy.py for jobs and results.

import { text } from "node:stream/consumers";

process.on("uncaughtException", (error) => {
  console.error(error); // and not the minified line that it comes from
  process.exit(1);
});

export async function serve(modes) {
  const results = [];
  for (const job of JSON.parse(await text(process.stdin))) {
    const found = {};
    for (const mode of job.modes) found[mode] = await modes[mode](job);
    results.push(found);
  }
  console.log("\n" + JSON.stringify(results));
}

export async function each(run, job) {
  const results = [];
  for (const row of job.rows) results.push(await run(job, [row]));
  return results;
}

export function padded(rows, pad) {
  const width = Math.max(...rows.map((row) => row.length));
  const fill = (row, value) => Array(width - row.length).fill(value);
  return {
    ids: rows.map((row) => [...fill(row, pad), ...row]),
    mask: rows.map((row) => [...fill(row, 0), ...row.map(() => 1)]),
  };
}

// p(correct) and whether a row is steered: the first element of every row, of the layer that carries them.
export function decisions(layer, cache, rows) {
  if (layer === null) return [];
  const slot = (name) => cache[`past_key_values.${layer}.${name}`];
  const first = (tensor, row) => tensor.data[(row * tensor.data.length) / rows];
  return Array.from({ length: rows }, (_, row) => [first(slot("value"), row), first(slot("key"), row) === 1]);
}
