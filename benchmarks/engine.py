"""What steering costs in vLLM, and how fast the arms of an evaluation are there; in vLLM's environment.

VLLM_CPU_KVCACHE_SPACE=1 .venv-vllm/bin/python benchmarks/engine.py --model DIR [--sequences 1,8] [--repeats 5]

On a CPU, --model is a folder that .venv made (for example .cache/smollm2, after `make bench`). Where CUDA is there, by
default a model of the shape of Qwen3-1.7B with random weights, made on the spot.

"steered" is a bank with one gated rule, of 50 random neurons in the upper half of the layers and a gate of 64 random
features in the lower half, which steers every request; "base" is the stock model in an engine of its own, with as much
memory for its KV cache; "base again" is another engine of it: how far its ratio is from 1 is the noise. Prompts are
random and never the same, so that no page is cached. Decoding has prompts of 16 tokens, which are part of its time.
The questions of the arms are word problems after two worked examples; one question is answered once under each arm.
"""

import contextlib
import os
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

from common import Times, in_turn, machine, options, quartiles, ratios, set_up, table

_PROMPT = 16
_KV_BYTES = 1 << 30
_GRAPHS = {"full": "FULL_AND_PIECEWISE", "piecewise": "PIECEWISE", "none": "NONE"}


def main() -> None:
    arguments = parsed()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    set_up(arguments)
    import torch

    if not torch.cuda.is_available():  # in this process, whose CPU seconds other programs do not disturb
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    print(machine(gpu_used=torch.cuda.is_available()))
    with tempfile.TemporaryDirectory() as scratch:
        folder = model_folder(arguments, Path(scratch))
        if "cost" in arguments.parts:
            cost(folder, arguments)
        if "arms" in arguments.parts:
            arms(folder, arguments)


def parsed() -> Namespace:
    parser: ArgumentParser = options(__doc__, repeats=5)
    parser.add_argument("--parts", default="cost,arms", help="what is measured (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", help="default: %(default)s; bfloat16 on a GPU")
    parser.add_argument("--sequences", default="1,8", help="requests at a time (default: %(default)s)")
    parser.add_argument("--prefill-tokens", type=int, default=256, help="length of a prompt (default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=64, help="decoded for each (default: %(default)s)")
    parser.add_argument("--graphs", choices=_GRAPHS, default="full", help="CUDA graphs (default: %(default)s)")
    parser.add_argument("--eager", action="store_true", help="no torch.compile, no CUDA graphs")
    parser.add_argument("--memory", type=float, default=1, help="GiB of each KV cache (default: %(default)s)")
    parser.add_argument("--questions", type=int, default=16, help="of the arms (default: %(default)s)")
    parser.add_argument("--draws", type=int, default=20, help="random arms (default: %(default)s)")
    return parser.parse_args()


def model_folder(arguments: Namespace, scratch: Path) -> Path:
    if arguments.model is not None:
        return Path(arguments.model)
    import torch
    from decode import QWEN3_1_7B, random_qwen3

    if not torch.cuda.is_available():
        raise SystemExit("--model: not given; expected the folder of a model")
    return random_qwen3(scratch / "base", QWEN3_1_7B)


def engine_options(arguments: Namespace) -> dict[str, Any]:
    return {
        "kv_cache_memory_bytes": int(arguments.memory * _KV_BYTES),
        "enforce_eager": arguments.eager,
        "compilation_config": {"cudagraph_mode": _GRAPHS["none" if arguments.eager else arguments.graphs]},
    }


@dataclass
class Side:
    """One engine, and what its requests set."""

    llm: Any
    dials: dict[str, Any] | None

    def run(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> None:
        from vllm import SamplingParams, TokensPrompt

        asked = [TokensPrompt(prompt_token_ids=list(ids)) for ids in prompts]
        how = SamplingParams(
            temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False, extra_args=self.dials
        )
        found = self.llm.generate(asked, how, use_tqdm=False)
        assert all(len(one.outputs[0].token_ids) == new_tokens for one in found)

    @property
    def blocks(self) -> tuple[int, int]:
        """How many the KV cache has, and the tokens of one."""
        cache = self.llm.llm_engine.vllm_config.cache_config
        return int(cache.num_gpu_blocks), int(cache.block_size)


@contextmanager
def engines(folder: Path, arguments: Namespace) -> Iterator[dict[str, Side]]:
    """The base, and the base steered, each in an engine."""
    from decode import any_rule
    from vllm import LLM

    from adaras_export.core.bank import BankRule
    from adaras_export.core.base_model import BaseModel
    from adaras_export.core.checkpoint import Checkpoint
    from adaras_export.serving.vllm.bank import opened
    from adaras_export.serving.vllm.dials import RULE, THRESHOLD

    most, context = max(sequences(arguments)), arguments.prefill_tokens + arguments.new_tokens
    how = engine_options(arguments)
    rule = any_rule(BaseModel.of(folder), gated=True)

    def base() -> Side:
        engine = LLM(
            model=str(folder),
            dtype=arguments.dtype,
            max_model_len=context,
            max_num_seqs=most,
            skip_tokenizer_init=True,
            generation_config="vllm",
            disable_log_stats=True,
            seed=0,
            **how,
        )
        closing.callback(engine.llm_engine.engine_core.shutdown)
        return Side(engine, None)

    with ExitStack() as closing:
        # The first engine of a process is slower on a CPU, steered or not: it is not measured.
        unmeasured, first = base(), base()
        opening = opened(
            Checkpoint(folder), [BankRule("rule", rule)], context, dtype=arguments.dtype, sequences=most, **how
        )
        steered = closing.enter_context(opening)
        dials = {RULE: "rule", THRESHOLD: 2.0}
        yield {"base": first, "steered": Side(steered._llm, dials), "base again": base()}
        del unmeasured


def sequences(arguments: Namespace) -> list[int]:
    return [int(one) for one in arguments.sequences.split(",")]


def cost(folder: Path, arguments: Namespace) -> None:
    from transformers import AutoConfig

    layers = AutoConfig.from_pretrained(folder).num_hidden_layers
    with engines(folder, arguments) as found:
        for requests in sequences(arguments):
            for what, length, new, budget in (
                ("prefill", arguments.prefill_tokens, 1, ""),
                ("decode", _PROMPT, arguments.new_tokens, ">= 0.98"),
            ):
                work = {name: work_of(one, requests, length, new) for name, one in found.items()}
                times = in_turn(work, arguments.repeats)
                print(f"{what}, {requests} at a time, {length if what == 'prefill' else new} tokens each:\n")
                print(speeds(times, requests * (length if what == "prefill" else new), budget), flush=True)
        (own, size), (base, base_size) = found["steered"].blocks, found["base"].blocks
    ratio = (base * base_size) / (own * size)
    print(
        f"KV cache: {base} blocks of {base_size} tokens for the base, {own} of {size} steered, in the same memory: "
        f"{ratio:.4f} times the base's memory for a token (budget: 1 + 1/{layers} = {1 + 1 / layers:.4f})\n"
    )


def speeds(times: Mapping[str, Times], tokens: int, budget: str) -> str:
    """A table of every side, with its speed in times the base's."""
    rows, base = [], times["base"]
    for name, one in times.items():
        speed = quartiles([tokens / seconds for seconds in one.wall], 1)
        against = [quartiles(ratios(*pair), 3) for pair in ((base.wall, one.wall), (base.cpu, one.cpu))]
        rows.append([name, speed, *(["1", "1"] if name == "base" else against)])
        rows[-1].append({"base": "", "base again": "noise"}.get(name, budget))
    return table(["", "tokens/s", "times the base's, wall", "times the base's, CPU", "budget"], rows)


def work_of(side: Side, requests: int, length: int, new: int) -> Callable[[], None]:
    """Requests with prompts that nothing has seen."""
    numbers = count()

    def run() -> None:
        draw = Random(f"{id(side)} {next(numbers)} {length} {new}")
        side.run([[draw.randrange(100, 20000) for _ in range(length)] for _ in range(requests)], new)

    return run


def arms(folder: Path, arguments: Namespace) -> None:
    """Off, the rule, its opposite and random neurons, on the same questions, by both backends."""
    from adaras_export.core.checkpoint import Checkpoint
    from adaras_export.data.checkers import last_number
    from adaras_export.demo import smollm2
    from adaras_export.evaluation.answer_cache import AnswerCache
    from adaras_export.evaluation.engine import Backend, Bank
    from adaras_export.evaluation.task import EvaluationTask
    from adaras_export.modeling.generation import Sampling
    from adaras_export.modeling.loading import load_model
    from adaras_export.serving.vllm.bank import opened

    model, tokenizer = load_model(folder, dtype=arguments.dtype)
    asked = smollm2.splits({"test": arguments.questions}, seed=1)["test"]
    most = max(sequences(arguments))
    task = EvaluationTask(asked, last_number, Sampling(arguments.new_tokens, stop="\n"), most)
    conditions = conditions_of(model, folder, arguments.draws)
    how = {"dtype": arguments.dtype, "sequences": most, **engine_options(arguments)}
    with ExitStack() as closing:
        held: list[Any] = []

        @contextmanager
        def kept(bank: Any, context: int) -> Iterator[Any]:
            """One engine for all rounds; only its cached pages are dropped."""
            if not held:
                held.append(closing.enter_context(opened(Checkpoint(folder), bank, context, **how)))
            held[0]._llm.reset_prefix_cache()
            yield held[0]

        found: dict[str, list[Any]] = {}

        def ask(name: str, backend: Backend | None) -> None:
            bank = None if backend is None else Bank(backend, conditions)
            with contextlib.closing(AnswerCache(model, tokenizer, task, bank=bank)) as cache:
                cache.ask(conditions)
            found[name] = [cache.answers(one).tokens for one in conditions]

        backends = {"transformers": None, "vllm": Backend("vllm", kept)}
        times = in_turn({name: partial(ask, name, one) for name, one in backends.items()}, arguments.repeats)
    report_arms(times, len(asked), len(conditions))
    equal = sum(int((one == other).sum()) for one, other in zip(*found.values(), strict=True))
    print(f"{equal} of {len(conditions) * len(asked)} answers have the same number of tokens\n")


def conditions_of(model: Any, folder: Path, draws: int) -> list[Any]:
    from decode import any_rule

    from adaras_export.core.base_model import BaseModel
    from adaras_export.evaluation.controls import random_control

    rule = any_rule(BaseModel.of(folder), gated=False)
    controls = [random_control(model, rule, seed) for seed in range(draws)]
    return [None, rule, rule.with_strength(-rule.strength), *controls]


def report_arms(times: Mapping[str, Times], questions: int, conditions: int) -> None:
    rows, first = [], times["transformers"]
    for name, one in times.items():
        hourly = quartiles([3600 * questions / seconds for seconds in one.wall], 0)
        against = [quartiles(ratios(*pair), 2) for pair in ((first.wall, one.wall), (first.cpu, one.cpu))]
        rows.append([name, hourly, *against])
    head = [
        "backend",
        f"questions an hour, under {conditions} arms each",
        "times transformers', wall",
        "times transformers', CPU",
    ]
    print(table(head, rows))


if __name__ == "__main__":
    main()
