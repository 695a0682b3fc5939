"""Driver of vLLM's offline engine: one checkpoint, the base's requests and a LoRA's in one batch.

Reads a list with one job from standard input, {"folder", "rows", "steps", "vocabulary", "engine", "lora"}, and prints
[{"plain": rows, "steered": rows}] on the last line; a row is {"ids", "logprobs"}, log-probabilities of every token.
"""

import json
import os
import sys

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process, or its errors are lost


def answer(llm, job, adapters):
    from vllm import SamplingParams, TokensPrompt

    prompts = [TokensPrompt(prompt_token_ids=row) for row in job["rows"]] * len(adapters)
    sampling = SamplingParams(temperature=0, max_tokens=job["steps"], logprobs=job["vocabulary"])
    requests = [adapter for adapter in adapters.values() for _ in job["rows"]]
    outputs = llm.generate(prompts, sampling, lora_request=requests, use_tqdm=False)
    rows = [as_row(output.outputs[0], job["vocabulary"]) for output in outputs]
    count = len(job["rows"])
    return {name: rows[at * count : (at + 1) * count] for at, name in enumerate(adapters)}


def as_row(output, vocabulary):
    tables = [[table[token].logprob for token in range(vocabulary)] for table in output.logprobs]
    return {"ids": list(output.token_ids), "logprobs": tables}


def main():
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    [job] = json.load(sys.stdin)
    lora = {"enable_lora": True, "max_lora_rank": 8} if job["lora"] else {}
    settings = {"dtype": "float32", "enforce_eager": True, "max_model_len": 128, "max_logprobs": -1, **lora}
    llm = LLM(model=job["folder"], disable_log_stats=True, **settings, **job["engine"])
    adapters = {"plain": None}
    if job["lora"]:
        adapters["steered"] = LoRARequest("steering", 1, job["lora"])
    print("\n" + json.dumps([answer(llm, job, adapters)]))


if __name__ == "__main__":
    main()
