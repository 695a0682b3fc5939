"""Adaptive steering inside a Transformers model: AdaRAS (arXiv 2601.19847), without hooks.

A small gate reads MLP activations of the prompt and predicts whether the model will be right. Where it
predicts a failure, a constant vector is added to the output of some MLPs, from the last prompt token (or the
first generated one) on. The vector is strength * W_down[:, idx] @ delta, which equals adding strength * delta
to the neurons idx before the down projection. This file opens no file, starts no process and uses no network.

The state of the sequences (what the gate has seen, and p(correct)) is stored on their KV cache; the state of one
forward pass is thread-local; the modules hold weights only. So one model object may serve several threads at once.

B sequences, T tokens of this call, D model width, F gate features, H gate width. Layers are 0-based.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.cache_utils import Cache

DECODER_ARGUMENTS = ("input_ids", "attention_mask", "position_ids", "inputs_embeds")
"""The arguments of a decoder's call that steering reads. The KV cache is found by its type, as its name varies."""


class _Thread(threading.local):
    """The state of one thread. Every attribute exists from the start, or a forward pass would be compiled twice."""

    def __init__(self) -> None:
        self.step: Step | None = None  # the forward pass that runs
        self.mlp: Any = None  # the MLP whose forward pass runs
        self.scope: Scope | None = None  # the generate() call that runs
        self.handed_on: tuple[Any, Any] = (None, None)  # steering_start and steering_valid, for the decoder
        self.off: tuple[int, ...] = ()  # ids of the dials that are switched off
        self.last: tuple[Any, Tensor | None] = (None, None)  # dials and p(correct) of the last generate() call


THREAD = _Thread()


@contextmanager
def here(**values: Any) -> Iterator[None]:
    """Set these attributes of ``THREAD`` while the context is open."""
    before = {name: getattr(THREAD, name) for name in values}
    try:
        for name, value in values.items():
            setattr(THREAD, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(THREAD, name, value)


class SteeringGate(nn.Module):
    """p(correct) from the activations of the prompt; kept in float32."""

    def __init__(self, feature_count: int, hidden_size: int) -> None:
        super().__init__()
        self.attention_weight = frozen(feature_count)
        self.attention_bias = frozen()
        self.hidden_weight = frozen(hidden_size, feature_count)
        self.hidden_bias = frozen(hidden_size)
        self.output_weight = frozen(hidden_size)
        self.output_bias = frozen()

    def forward(
        self, seen: "tuple[Tensor, Tensor] | None", more: "tuple[Tensor, Tensor] | None" = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sums to keep for each column, (B, T, H) and (B, T), and p(correct) from all of them, (B,).

        ``seen`` are the sums kept for earlier columns; ``more`` are the features of new columns, (B, T, F), and whether
        they are prompt tokens, (B, T). A linear layer follows the pooling, so H values are kept instead of F.
        """
        kept = [] if seen is None else [seen]
        kind = self.output_weight.device.type
        with torch.autocast("cpu" if kind == "meta" else kind, enabled=False):
            if more is not None:
                features_BTF, prompt_BT = more[0].to(self.attention_weight), more[1]
                score_BT = torch.tanh(features_BTF @ self.attention_weight + self.attention_bias)
                weight_BT = torch.exp(score_BT) * prompt_BT  # exp of [-1, 1]: no running maximum is needed
                kept.append((weight_BT.unsqueeze(-1) * (features_BTF @ self.hidden_weight.T), weight_BT))
            value_BTH, weight_BT = (torch.cat(part, dim=1) for part in zip(*kept, strict=True))
            pooled_BH = value_BTH.sum(1) / weight_BT.sum(1, keepdim=True)
            hidden_BH = torch.relu(pooled_BH + self.hidden_bias)
            return value_BTH, weight_BT, torch.sigmoid(hidden_BH @ self.output_weight + self.output_bias)


def frozen(*shape: int) -> nn.Parameter:
    """A parameter that is kept in float32 and not trained."""
    return nn.Parameter(torch.zeros(shape, dtype=torch.float32), requires_grad=False)


class SteeringState:
    """What the gate has seen of a batch of sequences; an attribute of their KV cache.

    It has one entry for each column of the cache up to the last prompt token, and follows when the cache loses
    columns or changes its rows. ``probability`` is p(correct), (B,), or None: no gate, or no prompt token yet.
    """

    def __init__(self) -> None:
        self.seen: tuple[Tensor, Tensor] | None = None
        self.probability: Tensor | None = None

    def see(self, gate: SteeringGate, features_BTF: Tensor, prompt_BT: Tensor, columns: int | None) -> None:
        """Add new columns, which follow ``columns`` columns of the cache (None: the columns seen so far)."""
        if self.seen is not None and columns is not None:
            value_BTH, weight_BT = self.seen
            if (gap := columns - weight_BT.shape[1]) < 0:
                raise ValueError(f"the KV cache lost {-gap} columns that the gate has judged; remove them with crop()")
            # Generated tokens lie between: they have no weight.
            self.seen = nn.functional.pad(value_BTH, (0, 0, 0, gap)), nn.functional.pad(weight_BT, (0, gap))
        value_BTH, weight_BT, self.probability = gate(self.seen, (features_BTF, prompt_BT))
        self.seen = value_BTH, weight_BT

    def crop(self, columns: int) -> None:
        """Keep the first ``columns`` columns; p(correct) is computed again when it is needed."""
        if self.seen is not None and self.seen[1].shape[1] > columns:
            value_BTH, weight_BT = self.seen
            self.seen, self.probability = (value_BTH[:, :columns], weight_BT[:, :columns]), None

    def change_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Pick, permute or repeat the sequences."""
        if self.seen is not None:
            self.seen = (change(self.seen[0]), change(self.seen[1]))
        if self.probability is not None:
            self.probability = change(self.probability)

    def probability_of(self, gate: SteeringGate, batch_size: int) -> Tensor:
        """p(correct) of each sequence of a batch, (B,)."""
        if self.probability is None and self.seen is not None:
            self.probability = gate(self.seen)[2]
        if self.probability is None:
            raise ValueError("the gate has not seen the prompt: pass it through this model, with this KV cache")
        if len(self.probability) != batch_size:
            raise ValueError(f"the KV cache belongs to {len(self.probability)} sequences; the batch has {batch_size}")
        return self.probability


_ROWS: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "reorder_cache": lambda rows, index: rows.index_select(0, index.to(rows.device)),
    "batch_select_indices": lambda rows, index: rows[index.to(rows.device) if isinstance(index, Tensor) else index],
    "batch_repeat_interleave": lambda rows, repeats: rows.repeat_interleave(repeats, dim=0),
}


def follow(cache: Cache) -> None:
    """Make the state on a KV cache change with it: its columns with crop(), its rows with the other methods."""
    for name in ("crop", *_ROWS) if not hasattr(cache, "steering_follows") else ():
        setattr(cache, name, partial(_changed, cache, name))
    cache.steering_follows = True  # type: ignore[attr-defined]


def _changed(cache: Any, name: str, argument: Any) -> None:
    getattr(type(cache), name)(cache, argument)
    state: SteeringState | None = getattr(cache, "steering_state", None)
    if state is not None and name == "crop":
        state.crop(int(cache.get_seq_length()))
    elif state is not None:
        state.change_rows(lambda rows: _ROWS[name](rows, argument))


def _dial(name: str, meaning: str) -> Any:
    """A number in the config, which can be read and set, and is saved with the model."""
    return property(
        lambda dials: float(dials._settings[name]),
        lambda dials, value: dials._settings.update({name: float(value)}),
        doc=meaning,
    )


class Steering:
    """The dials of a steered model: ``model.steering``. All calls on the model share them.

    ``strength``, ``threshold`` and ``enabled`` may be set; 0 and False give the base model's output, bit for bit (0
    in Gemma 4: but for rounding).
    """

    strength = _dial("strength", "Factor on every steering vector; negative reverses the direction.")
    threshold = _dial("threshold", "Sequences with p(correct) below it are steered; without a gate all are.")

    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = settings
        self.enabled = True

    @property
    def start(self) -> str:
        """The first steered token: "last_prompt_token" or "first_generated_token"."""
        return str(self._settings["start"])

    def off(self) -> AbstractContextManager[None]:
        """Switch steering off in this thread while the context is open; ``enabled`` is for all threads."""
        return here(off=(*THREAD.off, id(self)))

    @property
    def active(self) -> bool:
        """Whether this thread's calls are steered."""
        return self.enabled and id(self) not in THREAD.off

    @property
    def last_decisions(self) -> list[tuple[float, bool]]:
        """(p(correct), steered) for each row of this thread's last generate(); empty without a gate."""
        dials, judged = THREAD.last
        if judged is None or dials is not self:
            return []
        return [*zip(judged.tolist(), (judged < self.threshold).tolist(), strict=True)]  # compared in float32


class Step:
    """One forward pass: collects the gate's features, then gives the strength for each token.

    ``prompt_BT`` marks the prompt tokens that the gate has yet to read, up to the last column that may hold one;
    ``steered_BT`` (or a tensor broadcastable to it) marks the tokens to steer. None marks no token.
    """

    def __init__(
        self,
        state: SteeringState,
        gate: SteeringGate | None,
        dials: Steering,
        cache: Cache | None = None,
        columns: int | None = 0,
    ) -> None:
        self.state = state
        self.gate = gate
        self.dials = dials
        self.cache = cache
        self.columns = columns
        self.projections = 0  # how many have run
        self.prompt_BT: Tensor | None = None
        self.steered_BT: Tensor | None = None
        self._features: list[Tensor] = []
        self._scale: Tensor | None = None

    def place(self, start: "int | Tensor | None", valid_BT: Tensor) -> None:
        """Mark the tokens of a call in which generation begins at column ``start``, an int or (B, 1).

        It is below 1 if the prompt ended in an earlier call, above T if it goes on; None: where the padding begins.
        """
        if start is None:  # padding may be on either side
            start = valid_BT.shape[1] - valid_BT.flip(1).int().argmax(1, keepdim=True)
        first = start - int(self.dials.start == "last_prompt_token")
        column_T = torch.arange(valid_BT.shape[1], device=valid_BT.device)
        if isinstance(start, Tensor):
            self.prompt_BT = valid_BT & (column_T < start)
        elif start > 0:
            self.prompt_BT = valid_BT[:, :start]
        if isinstance(first, Tensor) or first < valid_BT.shape[1]:
            self.steered_BT = valid_BT & (column_T >= first)

    def place_packed(self, last_R: Tensor, ends_R: Tensor, position_1T: Tensor) -> None:
        """Mark the tokens of a call in which several requests share one row, as in continuous batching.

        ``last_R`` are the columns whose logits choose a token; ``ends_R`` is 0, then the column where each request
        ends. A request of several columns is a prompt or a part of one, and so is a token at position 0.
        """
        column_T = torch.arange(position_1T.shape[1], device=position_1T.device)
        self.steered_BT = (column_T[:, None] == last_R).any(1)[None]
        if self.dials.start == "first_generated_token":
            single_R = torch.where(ends_R[1:] - ends_R[:-1] == 1, ends_R[1:] - 1, -1)
            self.steered_BT = self.steered_BT & (column_T[:, None] == single_R).any(1) & (position_1T > 0)

    def read(self, hidden_BTM: Tensor, index_f: Tensor) -> None:
        """Collect one layer's gate features; called in the order of the layers."""
        if self.prompt_BT is not None:
            self._features.append(hidden_BTM[:, : self.prompt_BT.shape[1]].detach().index_select(-1, index_f))

    def settle(self) -> None:
        """Let the gate judge the collected features."""
        if self.gate is None or self.prompt_BT is None:
            return
        if sum(features.shape[-1] for features in self._features) != self.gate.attention_weight.shape[0]:
            raise ValueError("the gate reads layers that this call leaves out, as assistant_early_exit does; run them")
        with torch.no_grad():  # a recomputed layer must not look for activations saved here
            self.state.see(self.gate, torch.cat(self._features, dim=-1), self.prompt_BT, self.columns)
        self._features, self.prompt_BT = [], None  # recomputation for a gradient reads nothing

    def scale(self, like: Tensor) -> Tensor | None:
        """strength * g for each token, (B, T, 1) or broadcastable to it, float32; None if no token is steered."""
        if self.steered_BT is None:
            return None
        if self._scale is None:
            self.settle()
            steered_BT = self.steered_BT
            if self.gate is not None:
                judged_B = self.state.probability_of(self.gate, like.shape[0]) < self.dials.threshold
                steered_BT = steered_BT & judged_B.unsqueeze(1).to(steered_BT.device)
            self._scale = self.dials.strength * steered_BT.float().unsqueeze(-1)
        return self._scale.to(like.device)


def begin_step(
    model: nn.Module,
    gate: SteeringGate | None,
    dials: Steering,
    arguments: dict[str, Any],
    start: "int | Tensor | None" = None,
    valid_BT: Tensor | None = None,
) -> Step:
    """The step of a forward pass of ``model`` with these arguments.

    Raises:
        ValueError: the mask is not 2D, the KV cache was filled without the gate, or the mask counts earlier tokens that
            no KV cache holds.
    """
    tokens, scope = tokens_of(arguments), scope_of(model)
    mask = arguments.get("attention_mask") if valid_BT is None else valid_BT
    cache = cache_of(arguments)
    state, columns = getattr(cache, "steering_state", None), columns_in(cache)
    if cache is None:
        require_whole(tokens, mask)
        if scope is not None and start is None and arguments.get("use_cache") is False:
            raise ValueError("generate() makes calls of its own without a KV cache, as guidance_scale does; use one")
    fresh = state is None if columns is None else columns == 0
    if state is None and gate is not None and columns:
        raise ValueError("the KV cache was filled without the gate; fill it through this model, with steering on")
    step = Step(SteeringState() if fresh or state is None else state, gate, dials, cache, columns)
    if scope is not None and scope.state is None:  # later calls may have other prompts, as with guidance_scale
        scope.state = step.state
    if is_packed(arguments):
        step.place_packed(arguments["logits_indices"], arguments["cu_seq_lens_q"], arguments["position_ids"])
    elif tokens.shape[1] > 1 or fresh or start is not None:
        step.place(start, valid_tokens(mask, tokens))
    else:
        step.steered_BT = torch.ones(1, 1, dtype=torch.bool, device=tokens.device)
    return step


def parameter_names(function: Callable[..., Any], required: tuple[str, ...] = DECODER_ARGUMENTS) -> tuple[str, ...]:
    """The positional parameters of a Transformers method, without self.

    Raises:
        NotImplementedError: a parameter that steering reads is missing, so this version has renamed it.
    """
    found = signature(function).parameters.values()
    names = tuple(one.name for one in found if one.kind is Parameter.POSITIONAL_OR_KEYWORD and one.name != "self")
    if missing := ", ".join(name for name in required if name not in names):
        raise NotImplementedError(f"this Transformers has no {missing} in {function.__name__}(), which steering reads")
    return names


_PLAIN = (Tensor, dict, list, tuple, str, bool, int, float, type(None))


def cache_of(arguments: Mapping[str, Any]) -> Cache | None:
    """The KV cache among the arguments of a call, under any name: Transformers 5.24 changed it.

    Raises:
        ValueError: there are two caches, or one of an unknown kind.
    """
    found = None
    for value in arguments.values():
        if isinstance(value, Cache):
            if found is not None and found is not value:
                raise ValueError("two KV caches in one call; expected one")
            found = value
        elif not isinstance(value, _PLAIN) and "Cache" in type(value).__name__ and not is_packed(arguments):
            raise ValueError(f"{type(value).__name__}: is no KV cache that steering knows; expected a Cache")
    return found


def is_packed(arguments: Mapping[str, Any]) -> bool:
    """Whether several requests share the row of a call, as in continuous batching.

    Raises:
        ValueError: several requests share it, but the call does not show where their prompts end.
    """
    told = [arguments.get(name) is not None for name in ("logits_indices", "cu_seq_lens_q")]
    if any(told) and not all(told):
        raise ValueError("a packed call without logits_indices or cu_seq_lens_q does not show where its prompts end")
    return all(told)


def require_whole(tokens: Tensor, mask: Any) -> None:
    """Raise ValueError for a call without a KV cache whose attention mask counts earlier tokens."""
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] > tokens.shape[1]:
        raise ValueError(
            f"{tokens.shape[1]} of {mask.shape[1]} columns, and no KV cache that steering knows has the rest"
        )


def tokens_of(arguments: Mapping[str, Any]) -> Tensor:
    """The embeddings of a call, (B, T, D), or its token ids, (B, T)."""
    embeddings: Tensor | None = arguments.get("inputs_embeds")
    return arguments["input_ids"] if embeddings is None else embeddings


def columns_in(cache: Cache | None) -> Any:
    """Number of columns in a KV cache; None inside a compiled graph, where a static cache holds it as a tensor."""
    columns = 0 if cache is None else cache.get_seq_length()
    return None if isinstance(columns, Tensor) and torch.compiler.is_compiling() else int(columns)


def valid_tokens(attention_mask: Any, tokens: Tensor) -> Tensor:
    """Which tokens (B, T, ...) of a call are not padding, (B, T) bool, from a 2D attention mask or None."""
    if attention_mask is None:
        return torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2:
        raise ValueError("steering needs a 2D attention mask (1 token, 0 padding) where a call has several tokens")
    return attention_mask[:, -tokens.shape[1] :].bool()


def preview(step: Step, forward: Callable[..., Any], arguments: dict[str, Any]) -> None:
    """Run the prompt once more, unsteered, for a gate that reads steered layers, if the call also steers tokens.

    Raises:
        ValueError: earlier prompt tokens are in the KV cache, which this extra pass must not change.
    """
    if step.prompt_BT is None or step.steered_BT is None:
        return
    if not step.steered_BT.any():  # with this gate, steering begins at the first generated token
        step.steered_BT = None
        return
    if step.columns:
        raise ValueError("this gate needs the prompt in calls of its own: it reads layers that are steered")
    look = Step(step.state, step.gate, step.dials)
    look.prompt_BT, step.prompt_BT = step.prompt_BT, None
    uncached = {name: value for name, value in arguments.items() if not isinstance(value, Cache)}
    with here(step=look):
        forward(**{**uncached, "use_cache": False})
    look.settle()


def finish_step(step: Step, outputs: Any) -> None:
    """Let the gate judge if no steered layer needed it, and put the state on the KV cache, given or new."""
    step.settle()
    for one in (step.cache, *(outputs if isinstance(outputs, tuple) else outputs.values())):
        if isinstance(one, Cache):
            one.steering_state = step.state  # type: ignore[attr-defined]
            if not torch.compiler.is_compiling():  # generate() did it before
                follow(one)


class SteeredProjection:
    """Mix-in for the module that holds or is a down projection."""

    steering_vector: Tensor | None
    steering_index: Tensor | None

    def steered_down(self, hidden_BTM: Tensor, down: nn.Module) -> Tensor:
        """The down projection, plus the steering vector at the steered tokens."""
        output_BTD: Tensor = down(hidden_BTM)
        step = THREAD.step
        if step is None:  # switched off
            return output_BTD
        step.projections += 1
        if self.steering_index is not None:
            step.read(hidden_BTM, self.steering_index)
        if self.steering_vector is None or (scale := step.scale(output_BTD)) is None:
            return output_BTD
        return output_BTD + (scale * self.steering_vector).to(output_BTD.dtype)


class Scope:
    """A generate() call in progress on one model, in one thread."""

    def __init__(self, model: nn.Module, prompt_width: int) -> None:
        self.model = model
        self.prompt_width = prompt_width
        self.state: SteeringState | None = None
        self.place: tuple[int | None, Tensor | None] = (None, None)  # of the next call of a decoder under hooks

    @contextmanager
    def open(self) -> Iterator[None]:
        """Make this the running call; restores the number of layers if a draft with fewer layers fails."""
        config: Any = self.model.config
        layers = config.num_hidden_layers
        with here(scope=self):
            try:
                yield
            except BaseException:
                config.num_hidden_layers = layers
                raise

    def remember(self, dials: Steering, outputs: Any) -> None:
        """Keep the gate's decisions for `Steering.last_decisions`."""
        judged = None if self.state is None else self.state.probability
        if judged is not None:
            judged = judged[:: max(1, len(judged) // len(getattr(outputs, "sequences", outputs)))]  # one beam each
        THREAD.last = (dials, judged)


def scope_of(model: nn.Module) -> Scope | None:
    """This thread's innermost generate() call, if it is one on ``model`` (it may be an assistant's)."""
    scope = THREAD.scope
    return scope if scope is not None and scope.model is model else None


def require_generation(model_class: Any) -> None:
    """Require the parameters of generate() that show where the prompt ends.

    Raises:
        NotImplementedError: this Transformers has renamed one.
    """
    parameter_names(model_class.generate, ("inputs", "generation_config"))
    prepare = model_class.prepare_inputs_for_generation
    if "attention_mask" not in signature(prepare).parameters:  # Falcon-H1 hands them on as **kwargs
        prepare = GenerationMixin.prepare_inputs_for_generation
    parameter_names(prepare, ("input_ids", "attention_mask", "inputs_embeds"))


def prompt_width(inputs: Tensor | None, kwargs: dict[str, Any]) -> int:
    """Number of columns of the prompt given to generate(); 1 if it starts from the BOS token alone."""
    given = (kwargs.get("attention_mask"), kwargs.get("inputs_embeds"), inputs, kwargs.get("input_ids"))
    return next((int(one.shape[1]) for one in given if one is not None), 1)


def place_of(
    scope: Scope | None, input_ids: Tensor, mask: Tensor | None, prepared: dict[str, Any]
) -> tuple[int | None, Tensor | None]:
    """The column at which generation begins in a call prepared by generate(), and which of its tokens are not padding.

    ``input_ids`` are all ids so far; ``mask`` is the 2D mask (with a static cache, the call itself has a 4D mask). Both
    results are None if the shape of the call is enough: a single token after the prompt.

    Raises:
        ValueError: the mask counts earlier tokens that no KV cache holds.
    """
    cache, tokens = cache_of(prepared), tokens_of(prepared)
    if cache is None:
        require_whole(tokens, input_ids if mask is None else mask)
    # Version 5 drops a mask without padding; version 4 does not count the padding in a static cache.
    columns = columns_in(cache) if mask is None else mask.shape[1] - tokens.shape[1]
    if cache is not None:
        follow(cache)
        if not columns:  # the caller's cache was reset, which a compiled graph cannot see
            cache.steering_state = None  # type: ignore[attr-defined]
    if scope is None or (scope.prompt_width <= columns and tokens.shape[1] == 1):
        return None, None
    return scope.prompt_width - columns, valid_tokens(mask, tokens)
