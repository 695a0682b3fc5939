"""Driver of vLLM's offline engine with steered models: one engine for each job, and rounds of requests for it.

Reads a list of jobs from standard input, {"folder", "vocabulary", "engine", "rounds", "fault"}; a round is a list of
requests, {"ids", "steps", "dials", "lora"}, that are sent at once. Prints, on the last line, for each job
{"rounds": [[{"ids", "logprobs", "verdict"}]], "cached": [[tokens]]} or {"error": text}.

Every job runs in a fork of this process, which has imported vLLM once.
"""

import importlib
import json
import os
import sys
import tempfile
import traceback
from pathlib import Path

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process, or its errors are lost


def no_key():
    """Leave steering out of the prefix cache's keys."""
    from adaras_export.serving.vllm import scheduler

    scheduler.Dials.key = None
    scheduler.BlockHasher._hash = lambda self, content: self.algorithm(content)


def no_mask():
    """Let the gate read generated tokens, too."""
    from adaras_export.serving.vllm import gate

    gate._MASK = 0.0


FAULTS = {"no key": no_key, "no mask": no_mask}


def as_row(output, vocabulary):
    [answer] = output.outputs
    tables = [[table[token].logprob for token in range(vocabulary)] for table in answer.logprobs]
    verdict = (output.kv_transfer_params or {}).get("steering")
    return {"ids": list(answer.token_ids), "logprobs": tables, "verdict": verdict, "cached": output.num_cached_tokens}


def answer(llm, requests, vocabulary):
    from vllm import SamplingParams, TokensPrompt
    from vllm.lora.request import LoRARequest

    prompts = [TokensPrompt(prompt_token_ids=request["ids"]) for request in requests]
    sampling = [
        SamplingParams(temperature=0, max_tokens=one["steps"], logprobs=vocabulary, extra_args=one.get("dials"))
        for one in requests
    ]
    paths = sorted({one["lora"] for one in requests if one.get("lora")})
    adapters = [
        one.get("lora") and LoRARequest(one["lora"], 1 + paths.index(one["lora"]), one["lora"]) for one in requests
    ]
    outputs = llm.generate(prompts, sampling, lora_request=adapters if paths else None, use_tqdm=False)
    return [as_row(output, vocabulary) for output in outputs]


def run(job):
    from vllm import LLM

    for name in job.get("fault") or ():
        FAULTS[name]()
    settings = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256, "max_logprobs": -1}
    llm = LLM(model=job["folder"], disable_log_stats=True, **{**settings, **job["engine"]})
    return {"rounds": [answer(llm, requests, job["vocabulary"]) for requests in job["rounds"]]}


def run_forked(job):
    """What `run` returns, in a child of this process."""
    with tempfile.NamedTemporaryFile() as file:
        child = os.fork()
        if child == 0:
            os.dup2(2, 1)
            try:
                found = run(job)
            except Exception as error:  # noqa: BLE001 - whatever vLLM raises is the result
                traceback.print_exc()
                found = {"error": f"{type(error).__name__}: {error}"}
            Path(file.name).write_text(json.dumps(found))
            os._exit(0)
        os.waitpid(child, 0)
        return json.loads(Path(file.name).read_text())


def main():
    importlib.import_module("vllm.v1.engine.llm_engine")  # takes longer than an engine does

    print("\n" + json.dumps([run_forked(job) for job in json.load(sys.stdin)]))


if __name__ == "__main__":
    main()
