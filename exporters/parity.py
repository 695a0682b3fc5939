"""Compare the outputs of an artifact with the reference semantics of its rule.

Both sides run the same prompts: a left-padded batch, prefilled and then decoded with a cache along the reference's
greedy tokens. They run by the rule, always steered, off, and with a threshold that steers half of the rows. Artifacts
that users run with Transformers' `generate()` are compared through it as well; the reference calls forward directly.

B sequences, S generated tokens, V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase

from adaras_export.core.quantised import Format
from adaras_export.core.rule import SteeringRule
from adaras_export.exporters.checks import Check
from adaras_export.modeling.divergence import next_token_divergence
from adaras_export.modeling.generation import CACHE, Sampling, left_pad, with_defaults
from adaras_export.modeling.steering import steered, steered_everywhere
from adaras_export.runtime.steering_adaras import cache_of

Mode = Literal["rule", "always", "off"] | float
"""How to steer: by the rule, every row, no row, or the rows with p(correct) below a number."""


@dataclass(frozen=True)
class Tolerance:
    """How much an artifact may differ from the reference.

    Attributes:
        units: limit for logits, in units of the float32 rounding error of the largest logit.
        off: whether this limit also holds with steering off; else logits must be equal, bit for bit.
        probability: limit for p(correct).
        ties: whether a greedy token may differ if its logit is within twice the limit of the best one.
    """

    units: float
    off: bool = False
    probability: float = 1e-4
    ties: bool = False

    def of(self, logits: Tensor) -> float:
        """The limit for these reference logits."""
        return self.share * max(1.0, float(logits.abs().max()))

    @property
    def share(self) -> float:
        """The limit as a share of the largest logit."""
        return self.units * torch.finfo(torch.float32).eps

    def for_base(self, stored: Format) -> "Tolerance":
        """The tolerance where the base's weights are stored in a format, whose kernels may round more than the sums."""
        if not stored.rounded:
            return self
        return replace(self, units=_ROUNDED / torch.finfo(torch.float32).eps, ties=True)


# PyTorch sums in different orders. Measured over seven toy bases in all modes: up to 3.5 units; on SmolLM2-135M: 8.
# One negated delta of six moves logits by 7 * 10^4 units and more.
FLOAT32 = Tolerance(64)

# Kernels that round what enters or what they multiply it with: the reference adds the deltas before that, artifacts
# add the vector behind it.
_ROUNDED = 0.05

STEPS = 6
# The last one is long, and the only row without padding: what goes wrong far into a prompt must not pass.
_LENGTHS = (3, 7, 11, 72)


@dataclass(frozen=True)
class Play:
    """Outputs of one side: logits (B, S, V) float32, greedy tokens (B, S), and p(correct) (B,) with a gate."""

    logits_BSV: Tensor
    tokens_BS: Tensor
    probability_B: Tensor | None


class Player(Protocol):
    """One side of the comparison."""

    def play(self, rows: Sequence[Sequence[int]], mode: Mode, follow_BS: Tensor | None) -> Play:
        """Run prompts of token ids; then feed ``follow_BS``, or the side's own greedy tokens if it is None."""
        ...


class Artifact(Player, Protocol):
    """The side that is checked."""

    @property
    def tolerance(self) -> Tolerance:
        """How much it may differ from the reference."""
        ...

    @property
    def switchable(self) -> bool:
        """Whether it can be switched off."""
        ...

    def findings(self) -> Sequence[Check]:
        """Checks that were made when the artifact was opened."""
        ...


@runtime_checkable
class Generating(Protocol):
    """An artifact that its users run with Transformers' `generate()`."""

    def generate(self, rows: Sequence[Sequence[int]], mode: Mode, follow_BS: Tensor) -> Tensor:
        """Logits (B, S, V) of `generate()` on prompts of token ids; it is forced to generate ``follow_BS``."""
        ...


@runtime_checkable
class Answering(Protocol):
    """An artifact that completes prompts in the way its users run it."""

    def answer(
        self,
        tokenizer: PreTrainedTokenizerBase,
        rows: Sequence[Sequence[int]],
        sampling: Sampling,
        keys: Sequence[str],
    ) -> list[list[int]]:
        """New ids of every row of prompt ids, as from `generation.complete_ids`.

        Raises:
            ExportError: the artifact cannot sample.
        """
        ...


@dataclass(frozen=True)
class Reference:
    """The reference that an artifact must equal.

    Attributes:
        player: runs the part of the rule that the format can express.
        vocabulary: the number of token ids.
        context: the context length in tokens.
        whole: runs the whole rule; None if the format can express all of it.
        last_token: the token that every prompt must end with; None if any may.
        stored: the format of the base's weights; None if they are plain.
    """

    player: Player
    vocabulary: int
    context: int
    whole: Player | None = None
    last_token: int | None = None
    stored: Format | None = None


@dataclass(frozen=True)
class Script:
    """The prompts, the outputs of the reference, and their distance from the whole rule.

    ``single`` is the output for the last prompt without a batch, always steered.
    """

    rows: tuple[tuple[int, ...], ...]
    plays: Mapping[str, tuple[Mode, Play]]
    single: Play
    losses: tuple[Check, ...] = ()
    stored: Format | None = None


def rehearse(reference: Reference) -> Script:
    """Run the reference on pseudo-random prompts of several lengths."""
    generator = torch.Generator().manual_seed(0)
    lengths = [min(length, reference.context - STEPS) for length in _LENGTHS]
    draw = [torch.randint(reference.vocabulary, (length,), generator=generator).tolist() for length in lengths]
    end = reference.last_token
    rows = tuple(tuple(row) if end is None else (*row[:-1], end) for row in draw)
    modes: dict[str, Mode] = {"by the rule": "rule", "off": "off"}
    if reference.whole is None:  # otherwise every row is steered by the rule
        modes["steered always"] = "always"
    plays = {name: (mode, reference.player.play(rows, mode, None)) for name, mode in modes.items()}
    by_rule = plays["by the rule"][1]
    if by_rule.probability_B is not None:
        middle = float(by_rule.probability_B.double().sort().values[1:3].mean())
        plays["half of the rows steered"] = (middle, reference.player.play(rows, middle, None))
    mode, always = _always(plays)
    single = reference.player.play(rows[-1:], mode, always.tokens_BS[-1:])
    if reference.whole is None:
        return Script(rows, plays, single, stored=reference.stored)
    losses = (_loss(by_rule, reference.whole.play(rows, "rule", by_rule.tokens_BS)),)
    return Script(rows, plays, single, losses, reference.stored)


def _loss(static: Play, whole: Play) -> Check:
    divergence = next_token_divergence(whole.logits_BSV, static.logits_BSV)
    detail = f"{divergence.max():.3g} at most; `adaras-export eval --compare` measures it on your questions"
    name = "accepted loss: next-token KL from the whole rule, nats, on random tokens"
    return Check(name, float(divergence.mean()), None, detail)


def compare(script: Script, artifact: Artifact) -> list[Check]:
    """Run the script on an artifact and compare the outputs."""
    checks, tolerance = list(artifact.findings()), artifact.tolerance
    if script.stored is not None:
        tolerance = tolerance.for_base(script.stored)
        checks.append(_format_check(script.stored, tolerance))
    for name, (mode, expected) in script.plays.items():
        if mode == "off" and not artifact.switchable:
            continue
        found = artifact.play(script.rows, mode, expected.tokens_BS)
        limit = 0.0 if mode == "off" and not tolerance.off else tolerance.of(expected.logits_BSV)
        checks += _logit_checks(name, expected, found, limit, tie=2 * limit if tolerance.ties else 0)
        if mode == "rule" and expected.probability_B is not None:
            checks.append(_probability_check(expected, found, tolerance.probability))
    mode, always = _always(script.plays)
    single = artifact.play(script.rows[-1:], mode, always.tokens_BS[-1:])
    limit = tolerance.of(script.single.logits_BSV)
    checks.append(Check("one row alone, logits", _distance(single.logits_BSV, script.single.logits_BSV), limit))
    if isinstance(artifact, Generating):
        checks += _generate_checks(script, artifact, tolerance)
    effect = _distance(always.logits_BSV, script.plays["off"][1].logits_BSV)
    checks.append(Check("effect of steering on logits", effect, None, f"{effect / limit:.0f} times the limit"))
    return [*checks, *script.losses]


def _logit_checks(name: str, expected: Play, found: Play, limit: float, tie: float) -> list[Check]:
    prefill = _distance(found.logits_BSV[:, 0], expected.logits_BSV[:, 0])
    decode = _distance(found.logits_BSV[:, 1:], expected.logits_BSV[:, 1:])
    best_BS, taken_BS = (
        expected.logits_BSV.gather(-1, play.tokens_BS[..., None])[..., 0] for play in (expected, found)
    )
    other = int(((found.tokens_BS != expected.tokens_BS) & ~(best_BS - taken_BS <= tie)).sum())
    return [
        Check(f"{name}, prefill logits", prefill, limit),
        Check(f"{name}, decode logits", decode, limit),
        Check(f"{name}, greedy tokens that differ", other, 0, f"of {expected.tokens_BS.numel()}"),
    ]


def _always(plays: Mapping[str, tuple[Mode, Play]]) -> tuple[Mode, Play]:
    return plays.get("steered always", plays["by the rule"])


def _format_check(stored: Format, tolerance: Tolerance) -> Check:
    """The format of the base's weights, and what it allows; it has no limit of its own."""
    why = f", whose kernels round {stored.rounded}" if stored.rounded else ""
    return Check(f"{STORED}{stored.name}{why}: share of the largest logit that may differ", tolerance.share, None)


STORED = "base in "
"""How the name of the check begins that names the format of a quantised base; the name goes on up to a colon."""


def _generate_checks(script: Script, artifact: Artifact, tolerance: Tolerance) -> list[Check]:
    """Compare `generate()` on the batch and on the long prompt; both are steered at any threshold of the rule."""
    assert isinstance(artifact, Generating)
    batch_mode, batch = script.plays.get("half of the rows steered", script.plays["by the rule"])
    mode, always = _always(script.plays)
    found = {
        "a batch": (artifact.generate(script.rows, batch_mode, batch.tokens_BS), batch),
        "one prompt": (artifact.generate(script.rows[-1:], mode, always.tokens_BS[-1:]), script.single),
    }
    return [
        Check(
            f"generate(), {name}, logits",
            _distance(logits_BSV, expected.logits_BSV),
            tolerance.of(expected.logits_BSV),
        )
        for name, (logits_BSV, expected) in found.items()
    ]


def _probability_check(expected: Play, found: Play, limit: float) -> Check:
    if expected.probability_B is None or found.probability_B is None:
        return Check("gate, p(correct)", float("nan"), limit, "the artifact has no gate")
    return Check("gate, p(correct)", _distance(found.probability_B, expected.probability_B), limit)


def _distance(one: Tensor, other: Tensor) -> float:
    if one.shape != other.shape:  # for example, fewer steps
        return float("nan")
    return float((one.double() - other.double()).abs().max())  # NaN stays NaN, and fails


class ReferencePlayer:
    """A stock model under `steered`; ``everywhere`` ignores gate and start, as static artifacts do."""

    def __init__(self, model: nn.Module, rule: SteeringRule, *, everywhere: bool = False) -> None:
        self.model = model
        self.rule = rule
        self.everywhere = everywhere

    def play(self, rows: Sequence[Sequence[int]], mode: Mode, follow_BS: Tensor | None) -> Play:
        """Run prompts in ``mode``; see `Player`."""
        if mode == "off":
            return play_model(self.model, rows, follow_BS)
        if self.everywhere:
            with steered_everywhere(self.model, self.rule):
                return play_model(self.model, rows, follow_BS)
        rule, gate = self.rule, self.rule.gate
        if mode == "always":
            rule = rule.ungated()
        elif mode != "rule" and gate is not None:
            rule = replace(rule, gate=replace(gate, threshold=mode))
        with steered(self.model, rule):
            return play_model(self.model, rows, follow_BS)


@torch.no_grad()
def play_model(model: Callable[..., Any], rows: Sequence[Sequence[int]], follow_BS: Tensor | None) -> Play:
    """Left-padded prefill, then one token at a time with the KV cache."""
    ids, mask = left_pad(rows, 0, "cpu")
    cache, logits, tokens = None, [], []
    for step in range(STEPS):
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        outputs = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            **{CACHE: cache},
        )
        cache = cache_of(outputs)
        logits.append(outputs.logits[:, -1].float())
        tokens.append(logits[-1].argmax(-1))
        ids = (tokens[-1] if follow_BS is None else follow_BS[:, step])[:, None]
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
    state = getattr(cache, "steering_state", None)
    return Play(torch.stack(logits, 1), torch.stack(tokens, 1), None if state is None else state.probability)


@torch.no_grad()
def generate_logits(model: Any, rows: Sequence[Sequence[int]], follow_BS: Tensor | None) -> Tensor:  # noqa: ANN401
    """Logits of `generate()` of a Transformers or PEFT model, forced to generate ``follow_BS`` if that is given."""
    ids, mask = left_pad(rows, 0, "cpu")
    settings: Any = GenerationConfig
    greedy = settings(max_new_tokens=STEPS, do_sample=False, num_beams=1, pad_token_id=0)
    forced = [] if follow_BS is None else [_Following(follow_BS, ids.shape[1])]
    found = with_defaults(model, greedy).generate(
        input_ids=ids,
        attention_mask=mask,
        logits_processor=LogitsProcessorList(forced),
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.stack(found.logits, 1).float()


class _Following(LogitsProcessor):
    """Forces given tokens; `output_logits` are the logits before it."""

    def __init__(self, follow_BS: Tensor, width: int) -> None:
        self.follow_BS = follow_BS
        self.width = width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token_B = self.follow_BS[:, input_ids.shape[1] - self.width]
        return torch.full_like(scores, -torch.inf).scatter_(1, token_B[:, None], 0.0)
