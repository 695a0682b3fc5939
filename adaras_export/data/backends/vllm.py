"""Complete attempts with vLLM's offline engine, run inside vLLM's own environment (it pins another Transformers).

Knows no answers. Prompts are encoded as everywhere else here; batching inside a batch is vLLM's business, so a batch
should be large, and the same seed gives the same texts only up to rounding.
"""

from collections.abc import Collection, Generator, Mapping, Sequence
from typing import Any

from adaras_export.core.checkpoint import Checkpoint
from adaras_export.core.traces import Question, Settings
from adaras_export.data.sampling_plan import Attempt, Completion
from adaras_export.errors import TraceError, require
from adaras_export.files.hub import fetch
from adaras_export.modeling.generation import Sampling, encode_prompt, row_seed, sampled_by, template_digest
from adaras_export.modeling.loading import Dtype
from adaras_export.modeling.vllm_engine import open_engine


class VllmBackend:
    """One engine on this machine, and batches of prompts for it.

    Raises:
        MissingExtraError: vLLM is not in this environment.
        ArtifactError: no model there, or vLLM cannot load it.
    """

    streams = False

    def __init__(self, model: str, sampling: Sampling, *, dtype: Dtype, revision: str | None = None) -> None:
        self._vllm: Any = require("vllm", "vllm", "the backend vllm")
        self._sampling, self._dtype = sampling, dtype
        self._prompts: dict[str, list[int]] = {}
        folder = fetch(model, revision)
        Checkpoint(folder).require_buildable()
        self._engine = open_engine(self._vllm, folder, model, {"dtype": dtype, "trust_remote_code": False})

    @property
    def settings(self) -> Settings:
        """The sampling, the precision and the chat template."""
        template = template_digest(self._engine.get_tokenizer())
        return sampled_by("vllm", self._sampling, dtype=self._dtype, template=template)

    def arranged(self, questions: Sequence[Question]) -> Sequence[Question]:
        """The questions as they are: the engine makes its own batches.

        Raises:
            TraceError: a prompt that the tokenizer has no form for, or that leaves no room in the context.
        """
        tokenizer = self._engine.get_tokenizer()
        self._prompts = {one.id: encode_prompt(tokenizer, one.prompt) for one in questions}
        room = self._engine.model_config.max_model_len - self._sampling.max_new_tokens
        if long := [one.id for one in questions if len(self._prompts[one.id]) > room]:
            raise TraceError(
                f"question {long[0]}: prompt of {len(self._prompts[long[0]])} tokens; {self._sampling.max_new_tokens} "
                f"new ones exceed the context of {self._engine.model_config.max_model_len}; expected fewer new tokens"
            )
        return questions

    def complete(
        self, batch: Sequence[Attempt], missing: Collection[str]
    ) -> Generator[Mapping[str, Completion], None, None]:
        """One piece, of what is missing."""
        work = [attempt for attempt in batch if attempt.id in missing]
        prompts = [self._vllm.TokensPrompt(prompt_token_ids=self._prompts[one.question.id]) for one in work]
        settings = [self._settings(attempt.id) for attempt in work]
        outputs = self._engine.generate(prompts, settings, use_tqdm=False)
        found = [output.outputs[0] for output in outputs]
        yield {
            attempt.id: Completion(one.text, cut=one.finish_reason == "length")
            for attempt, one in zip(work, found, strict=True)
        }

    def _settings(self, key: str) -> Any:  # noqa: ANN401 - of an optional library
        sampling = self._sampling
        return self._vllm.SamplingParams(
            max_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=row_seed(sampling.seed, key),
            stop=[] if sampling.stop is None else [sampling.stop],
        )
