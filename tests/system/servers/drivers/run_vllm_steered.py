"""Driver of vLLM's offline engine with steered models: rounds of requests for one engine after another.

Reads lists of jobs from standard input, one list a line, {"folder", "vocabulary", "engine", "rounds", "patches",
"environment"}; a round is a list of requests, {"ids", "steps", "dials", "lora"}, that are sent at once, or one request
that is to be refused. Answers a list with a line: for each job {"rounds": [[{"ids", "logprobs", "verdict", "cached"}]
or {"error": text}], "seen": what vLLM did}, or {"error": text} of an engine that does not start.

Every list runs in a fork of this process, which has imported vLLM once.
"""

import importlib
import itertools
import json
import os
import sys
import tempfile
import traceback
from functools import wraps
from pathlib import Path

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process, or its errors are lost


def no_key():
    """Leave steering out of the prefix cache's keys."""
    from adaras_export.serving.vllm import scheduler

    scheduler.BlockHasher._hash = lambda self, content: self.algorithm(content)


def no_mask():
    """Let the gate read generated tokens, too."""
    from adaras_export.serving.vllm import gate

    gate._MASK = 0.0


def by_call():
    """Take for the prompt what comes with more than one token, as hooks on a model do that know nothing else."""
    from adaras_export.serving.vllm.gate import Steering

    native = Steering.place

    def place(self, position_T, dials):
        ends = dials["prompt_length"].clone()
        starts = [0, *(position_T.diff() != 1).nonzero()[:, 0].add(1).tolist(), len(position_T)]
        for start, end in itertools.pairwise(starts):
            ends[start:end] = position_T[end - 1] + 1 if end - start > 1 else 0
        native(self, position_T, {**dials, "prompt_length": ends, "first": ends - 1})

    Steering.place = place


def configured(change):
    """Change vLLM's configuration where its platform for CPUs has settled it."""
    from vllm.platforms.cpu import CpuPlatform

    native = CpuPlatform.check_and_update_config.__func__

    def check_and_update_config(platform, vllm_config):
        native(platform, vllm_config)
        change(vllm_config)

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)


def ahead():
    """Schedule asynchronously, which the platform turns off."""
    configured(lambda config: setattr(config.scheduler_config, "async_scheduling", True))


def pieces():
    """Split the model at its attention, as on CUDA; the platform compiles it whole."""
    from vllm.config import CompilationMode

    def change(config):
        compilation = config.compilation_config
        compilation.mode, compilation.backend, compilation.compile_sizes = CompilationMode.VLLM_COMPILE, "eager", []

    configured(change)


def another_version():
    import vllm

    vllm.__version__ = "0.99.1"


PATCHES = {one.__name__: one for one in (no_key, no_mask, by_call, ahead, pieces, another_version)}


def watched(scheduler):
    """Counts of what a scheduler does, from now on."""
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler

    seen = {"ahead": isinstance(scheduler, AsyncScheduler), "steps": 0, "mixed": 0, "preempted": 0, "drafts": 0}
    schedule, preempt = scheduler.schedule, scheduler._preempt_request

    @wraps(schedule)
    def counted_schedule(*args, **kwargs):
        output = schedule(*args, **kwargs)
        counts = output.num_scheduled_tokens.values()
        seen["steps"] += 1
        seen["mixed"] += min(counts, default=1) == 1 < max(counts, default=1)
        seen["drafts"] += sum(map(len, output.scheduled_spec_decode_tokens.values()))
        return output

    @wraps(preempt)
    def counted_preempt(*args, **kwargs):
        seen["preempted"] += 1
        return preempt(*args, **kwargs)

    scheduler.schedule, scheduler._preempt_request = counted_schedule, counted_preempt
    return seen


def as_row(output, vocabulary):
    [answer] = output.outputs
    tables = [[table[token].logprob for token in range(vocabulary)] for table in answer.logprobs]
    verdict = (output.kv_transfer_params or {}).get("steering")
    return {"ids": list(answer.token_ids), "logprobs": tables, "verdict": verdict, "cached": output.num_cached_tokens}


NUMBERS = {}  # of adapters, by their paths


def answer(llm, requests, vocabulary):
    from vllm import SamplingParams, TokensPrompt
    from vllm.lora.request import LoRARequest

    prompts = [TokensPrompt(prompt_token_ids=request["ids"]) for request in requests]
    sampling = [
        SamplingParams(temperature=0, max_tokens=one["steps"], logprobs=vocabulary, extra_args=one.get("dials"))
        for one in requests
    ]

    def adapter(path):
        return path and LoRARequest(path, NUMBERS.setdefault(path, len(NUMBERS) + 1), path)

    adapters = [adapter(request.get("lora")) for request in requests]
    how = {"lora_request": adapters} if any(adapters) else {}
    outputs = llm.generate(prompts, sampling, use_tqdm=False, **how)
    return [as_row(output, vocabulary) for output in outputs]


def search(llm, request):
    from vllm import TokensPrompt
    from vllm.sampling_params import BeamSearchParams

    llm.beam_search([TokensPrompt(prompt_token_ids=request["ids"])], BeamSearchParams(beam_width=2, max_tokens=2))
    return "searched"


def stream(llm, request):
    from vllm import SamplingParams, TokensPrompt

    prompt = TokensPrompt(prompt_token_ids=request["ids"])
    engine = llm.llm_engine
    engine.input_processor.process_inputs("0", prompt, SamplingParams(), engine.get_supported_tasks(), resumable=True)
    return "streamed"


KINDS = {"search": search, "stream": stream}


def play(llm, requests, vocabulary):
    """One round; or the error of a request that is to be refused, whose neighbours must not notice."""
    if isinstance(requests, list):
        return answer(llm, requests, vocabulary)
    try:
        if "kind" in requests:
            return KINDS[requests["kind"]](llm, requests)
        return answer(llm, [requests], vocabulary)
    except Exception as error:  # noqa: BLE001 - whatever vLLM raises is the result
        return {"error": f"{type(error).__name__}: {error}"}


def run(job):
    from vllm import LLM
    from vllm.compilation.counter import compilation_counter

    os.environ.update(job.get("environment", {}))
    for name in job.get("patches", ()):
        PATCHES[name]()
    settings = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256, "max_logprobs": -1}
    settings |= {"block_size": 32, "max_num_seqs": 8}
    llm = LLM(model=job["folder"], disable_log_stats=True, **{**settings, **job.get("engine", {})})
    seen = watched(llm.llm_engine.engine_core.engine_core.scheduler)
    rounds = [play(llm, requests, job["vocabulary"]) for requests in job["rounds"]]
    seen |= {"compiled": compilation_counter.num_aot_compiles, "pieces": compilation_counter.num_piecewise_graphs_seen}
    llm.llm_engine.engine_core.shutdown()
    return {"rounds": rounds, "seen": seen}


def found_by(job):
    try:
        return run(job)
    except Exception as error:  # noqa: BLE001 - whatever vLLM raises is the result
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}


def run_forked(jobs):
    """What `run` returns for each of ``jobs``, in one child of this process."""
    with tempfile.NamedTemporaryFile() as file:
        child = os.fork()
        if child == 0:
            Path(file.name).write_text(json.dumps([found_by(job) for job in jobs]))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        return json.loads(Path(file.name).read_text() or json.dumps([{"error": f"it died with status {status}"}]))


def main():
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM prints to standard output
    importlib.import_module("vllm.v1.engine.llm_engine")  # takes longer than an engine does
    registry = importlib.import_module("vllm.model_executor.models.registry")
    registry._run_in_subprocess = lambda look: look()  # vLLM looks at a class in a process that imports it all again
    for line in sys.stdin:
        print(json.dumps(run_forked(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
