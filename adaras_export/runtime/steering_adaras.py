"""Adaptive steering inside a Transformers model: AdaRAS (arXiv 2601.19847), without hooks.

A small gate reads MLP activations of the prompt and predicts whether the model will be right. Where it
predicts a failure, a constant vector is added to the output of some MLPs, from the last prompt token (or the
first generated one) on. That vector is strength * W_down[:, idx] @ delta: what adding strength * delta to the
neurons idx before the down projection amounts to. Opens no file, starts no process, uses no network.

What belongs to sequences (the gate's sums and its verdict) rides on their KV cache; what belongs to one forward
pass is thread-local; the modules hold weights only. So calls on one model object may run at the same time.

B sequences, T tokens of this call, D model width, F gate features, H gate width. Layers are 0-based.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin, PreTrainedModel, modeling_utils
from transformers.cache_utils import Cache

try:
    from transformers import conversion_mapping
except ImportError:  # Transformers 4
    conversion_mapping = None  # type: ignore[assignment]

DECODER_ARGUMENTS = ("input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds")


class _Thread(threading.local):
    """What holds in one thread. All of it is there from the start, or a compiled forward pass is compiled twice."""

    def __init__(self) -> None:
        self.step: Step | None = None  # the forward pass that runs
        self.scope: Scope | None = None  # the generate() call that runs
        self.handed_on: tuple[Any, Any] = (None, None)  # steering_start and steering_valid, past a Transformers class
        self.off: tuple[int, ...] = ()  # ids of the dials that are switched off
        self.last: tuple[Any, Tensor | None] = (None, None)  # dials and p(correct) of the last generate() call


THREAD = _Thread()


@contextmanager
def here(**values: Any) -> Iterator[None]:
    """Let these attributes of ``THREAD`` hold for as long as the context lasts."""
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
        self.attention_weight = _parameter(feature_count)
        self.attention_bias = _parameter()
        self.hidden_weight = _parameter(hidden_size, feature_count)
        self.hidden_bias = _parameter(hidden_size)
        self.output_weight = _parameter(hidden_size)
        self.output_bias = _parameter()

    def pool(self, features_BTF: Tensor, prompt_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Softmax-weighted sum of the features over the prompt tokens, and the sum of the weights: (B, F), (B, 1)."""
        features_BTF = features_BTF.to(self.attention_weight)
        score_BT = torch.tanh(features_BTF @ self.attention_weight + self.attention_bias)
        weight_BT = torch.exp(score_BT) * prompt_BT  # exp of [-1, 1]: no running maximum is needed
        return torch.einsum("bt,btf->bf", weight_BT, features_BTF), weight_BT.sum(1, keepdim=True)

    def forward(self, pooled_BF: Tensor) -> Tensor:
        """p(correct), (B,)."""
        hidden_BH = torch.relu(pooled_BF @ self.hidden_weight.T + self.hidden_bias)
        return torch.sigmoid(hidden_BH @ self.output_weight + self.output_bias)


def _parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape, dtype=torch.float32), requires_grad=False)


class SteeringState:
    """What the gate has seen of a batch of sequences; an attribute of their KV cache.

    ``probability`` is p(correct), (B,), or None before the first prompt token and where there is no gate.
    """

    def __init__(self) -> None:
        self.weighted_BF: Tensor | float = 0.0
        self.weight_B1: Tensor | float = 0.0
        self.probability: Tensor | None = None

    def see(self, gate: SteeringGate, features_BTF: Tensor, prompt_BT: Tensor) -> None:
        """Take further prompt tokens into account."""
        weighted_BF, weight_B1 = gate.pool(features_BTF, prompt_BT)
        self.weighted_BF, self.weight_B1 = self.weighted_BF + weighted_BF, self.weight_B1 + weight_B1
        self.probability = gate(self.weighted_BF / self.weight_B1)

    def probability_of(self, batch_size: int) -> Tensor:
        """p(correct) for a batch that may hold each sequence several times in a row (beams)."""
        if self.probability is None:
            raise ValueError("the gate has not seen the prompt: pass it through this model, with this KV cache")
        copies, rest = divmod(batch_size, len(self.probability))
        if rest:
            raise ValueError(f"the KV cache belongs to {len(self.probability)} sequences; the batch has {batch_size}")
        return self.probability.repeat_interleave(copies) if copies > 1 else self.probability


def _dial(name: str, meaning: str) -> Any:
    """A number of the config: read, set, and saved with the model."""
    return property(
        lambda dials: float(dials._settings[name]),
        lambda dials, value: dials._settings.update({name: float(value)}),
        doc=meaning,
    )


class Steering:
    """The dials of a steered model: ``model.steering``. Shared by all calls on that model.

    ``strength``, ``threshold`` and ``enabled`` may be set; 0 and False give the base model's output, bit for bit.
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
        """The base model, in this thread, for as long as the context lasts; ``enabled`` is for all threads."""
        return here(off=(*THREAD.off, id(self)))

    @property
    def active(self) -> bool:
        """Whether this thread's calls are steered."""
        return self.enabled and id(self) not in THREAD.off

    @property
    def last_decisions(self) -> list[tuple[float, bool]]:
        """(p(correct), steered) of each row of what this thread's last generate() gave; empty without a gate."""
        dials, judged = THREAD.last
        return [] if judged is None or dials is not self else [(p, p < self.threshold) for p in judged.tolist()]


class Step:
    """One forward pass: collects the gate's features, then says how much each token is steered.

    ``prompt_BT`` marks the prompt tokens that the gate is still to judge, ``steered_BT`` (or broadcastable to it) those
    to steer; None is none.
    """

    def __init__(self, state: SteeringState, gate: SteeringGate | None, dials: Steering) -> None:
        self.state = state
        self.gate = gate
        self.dials = dials
        self.prompt_BT: Tensor | None = None
        self.steered_BT: Tensor | None = None
        self._features: list[Tensor] = []
        self._scale: Tensor | None = None

    def place(self, start: "int | Tensor | None", valid_BT: Tensor) -> None:
        """Mark the tokens of a call in which generation begins at column ``start``, an int or (B, 1).

        It is below 1 where the prompt ended earlier, above T where it goes on later; None: where the padding begins.
        """
        if start is None:  # padding may be on either side
            start = valid_BT.shape[1] - valid_BT.flip(1).int().argmax(1, keepdim=True)
        first = start - int(self.dials.start == "last_prompt_token")
        column_T = torch.arange(valid_BT.shape[1], device=valid_BT.device)
        if isinstance(start, Tensor) or start > 0:
            self.prompt_BT = valid_BT & (column_T < start)
        if isinstance(first, Tensor) or first < valid_BT.shape[1]:
            self.steered_BT = valid_BT & (column_T >= first)

    def place_packed(self, last_R: Tensor, ends_R: Tensor, position_1T: Tensor) -> None:
        """Mark the tokens of a call in which several requests share one row, as in continuous batching.

        ``last_R`` are the columns whose logits choose a token, ``ends_R`` where each request ends, with a 0 before.
        A request of several columns is a prompt or a piece of one; so is the first token of all.
        """
        column_T = torch.arange(position_1T.shape[1], device=position_1T.device)
        self.steered_BT = (column_T[:, None] == last_R).any(1)[None]
        if self.dials.start == "first_generated_token":
            single_R = torch.where(ends_R[1:] - ends_R[:-1] == 1, ends_R[1:] - 1, -1)
            self.steered_BT = self.steered_BT & (column_T[:, None] == single_R).any(1) & (position_1T > 0)

    def read(self, hidden_BTM: Tensor, index_f: Tensor) -> None:
        """Take one layer's gate features, in the order of the layers."""
        if self.prompt_BT is not None:
            self._features.append(hidden_BTM.detach().index_select(-1, index_f))

    def settle(self) -> None:
        """Let the gate judge what was read."""
        if self._features and self.gate is not None and self.prompt_BT is not None:
            with torch.no_grad():  # or a layer that is computed again would lack what was saved here
                self.state.see(self.gate, torch.cat(self._features, dim=-1), self.prompt_BT)
            self._features, self.prompt_BT = [], None  # what is computed again for a gradient is not read again

    def scale(self, like: Tensor) -> Tensor | None:
        """strength * g per token, (B, T, 1) or broadcastable to it, float32; None where nothing is steered."""
        if self.steered_BT is None:
            return None
        if self._scale is None:
            self.settle()
            steered_BT = self.steered_BT
            if self.gate is not None:
                judged_B = self.state.probability_of(like.shape[0]) < self.dials.threshold
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
        ValueError: the mask is not 2D, or the KV cache was filled without the gate.
    """
    cache, tokens, scope = arguments["past_key_values"], tokens_of(arguments), scope_of(model)
    state, columns = getattr(cache, "steering_state", None), columns_in(cache)
    fresh = state is None if columns is None else columns == 0
    if state is None and gate is not None and columns:
        raise ValueError("past_key_values was filled without the gate; fill it through this model, with steering on")
    step = Step(SteeringState() if fresh or state is None else state, gate, dials)
    if scope is not None and scope.state is None:  # later ones may be of other prompts: guidance_scale has an empty one
        scope.state = step.state
    if (last_R := arguments.get("logits_indices")) is not None:  # continuous batching
        step.place_packed(last_R, arguments["cu_seq_lens_q"], arguments["position_ids"])
    elif tokens.shape[1] > 1 or fresh or start is not None:
        valid_BT = valid_tokens(arguments["attention_mask"], tokens) if valid_BT is None else valid_BT
        step.place(start, valid_BT)
    else:
        step.steered_BT = torch.ones(1, 1, dtype=torch.bool, device=tokens.device)
    return step


def tokens_of(arguments: dict[str, Any]) -> Tensor:
    """The embeddings, (B, T, D), or else the ids, (B, T), of a call."""
    embeddings: Tensor | None = arguments.get("inputs_embeds")
    return arguments["input_ids"] if embeddings is None else embeddings


def columns_in(cache: Cache | None) -> Any:
    """Columns in a KV cache; None inside a compiled graph, where a static cache knows it as a tensor only."""
    columns = 0 if cache is None else cache.get_seq_length()
    return None if isinstance(columns, Tensor) and torch.compiler.is_compiling() else int(columns)


def valid_tokens(attention_mask: Any, tokens: Tensor) -> Tensor:
    """Which tokens (B, T, ...) of a call are no padding, (B, T) bool, from a 2D attention mask or None."""
    if attention_mask is None:
        return torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2:
        raise ValueError("steering needs a 2D attention mask (1 token, 0 padding) where a call has several tokens")
    return attention_mask[:, -tokens.shape[1] :].bool()


def preview(step: Step, forward: Callable[..., Any], arguments: dict[str, Any]) -> None:
    """Let a gate that reads steered layers see the prompt first, where a call holds prompt and steered tokens.

    Raises:
        ValueError: earlier prompt tokens are in the KV cache, which this extra pass must not touch.
    """
    if step.prompt_BT is None or step.steered_BT is None:
        return
    if not (step.steered_BT & ~step.prompt_BT).any():
        step.steered_BT = None
        return
    if columns_in(arguments["past_key_values"]):
        raise ValueError("this gate needs the prompt in calls of its own: it reads layers that are steered")
    look = Step(step.state, step.gate, step.dials)
    look.prompt_BT, step.prompt_BT = step.prompt_BT, None
    with here(step=look):
        forward(**{**arguments, "past_key_values": None, "use_cache": False})
    look.settle()


def finish_step(step: Step, cache: Cache | None, outputs: Any) -> None:
    """Let the gate judge what no steered layer asked for, and hand the state to the KV cache, given or new."""
    step.settle()
    for one in (cache, *(outputs if isinstance(outputs, tuple) else outputs.values())):
        if isinstance(one, Cache):
            one.steering_state = step.state  # type: ignore[attr-defined]


class OwnModelType:
    """The ``model_type`` of a configuration's class, which config.json has; each configuration itself has its base's.

    By the latter Transformers 5 chooses the tokenizer's class, whatever tokenizer_config.json says of some families.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, config: Any, owner: type) -> str:
        return self.name if config is None else self.name.removeprefix("adaras_")

    def __set__(self, config: Any, name: str) -> None:
        """Transformers sets what config.json says."""


class SteeredMLP:
    """Mix-in for an MLP: its forward hands h and the untouched down projection to `steered_down`."""

    steering_vector: Tensor | None
    steering_index: Tensor | None

    def steered_down(self, hidden_BTM: Tensor, down: nn.Module) -> Tensor:
        """The down projection, plus the steering vector at the steered tokens."""
        output_BTD: Tensor = down(hidden_BTM)
        step = THREAD.step
        if step is None:  # switched off
            return output_BTD
        if self.steering_index is not None:
            step.read(hidden_BTM, self.steering_index)
        if self.steering_vector is None or (scale := step.scale(output_BTD)) is None:
            return output_BTD
        return output_BTD + (scale * self.steering_vector).to(output_BTD.dtype)


class SteeredGatedMLP(SteeredMLP):
    """The MLP that most families have: an activated gate times an up projection."""

    def forward(self, x: Tensor) -> Tensor:
        """As the base does, up to the down projection."""
        own: Any = self
        return self.steered_down(own.act_fn(own.gate_proj(x)) * own.up_proj(x), own.down_proj)


class _Steered(PreTrainedModel):
    """What decoder and causal language model share: their place in the Transformers library."""

    install_steering: Callable[[Any], None]

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.install_steering(config)
        # On the instance, after construction: Transformers 4.57 checks the class's list against modules that exist.
        kept = set(self._keep_in_fp32_modules_strict or ())
        self._keep_in_fp32_modules_strict = kept | {"steering_gate", "steering_vector"}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Rename checkpoint keys as for the steered class: Transformers 5 does it by name, and for its own classes."""
        super().__init_subclass__(**kwargs)
        native: Any = next(parent for parent in cls.__mro__ if parent.__module__.startswith("transformers."))
        names = (native.__name__, getattr(native.config_class, "model_type", None)) if conversion_mapping else ()
        for name in names:
            if (rules := conversion_mapping.get_checkpoint_conversion_mapping(name)) is not None:
                conversion_mapping.register_checkpoint_conversion_mapping(cls.__name__, rules, overwrite=True)
                break

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in Transformers, which makes every parameter trainable; gate and vectors stay frozen."""
        # Else version 4 leaves buffers of layers on disk as they are: the gate's indices would be zero.
        loaded = super().from_pretrained(*args, **{"offload_buffers": True, **kwargs})
        for name, parameter in (loaded[0] if isinstance(loaded, tuple) else loaded).named_parameters():
            parameter.requires_grad &= "steering_" not in name
        return loaded

    def _set_gradient_checkpointing(  # type: ignore[override]
        self, *, gradient_checkpointing_func: Callable[..., Any] = checkpoint, **kwargs: Any
    ) -> None:
        """Steer a layer that is computed again for its gradient as it was steered the first time."""

        def steered(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
            return gradient_checkpointing_func(here(step=THREAD.step)(function), *args, **options)

        super()._set_gradient_checkpointing(gradient_checkpointing_func=steered, **kwargs)


class SteeredModel(_Steered):
    """Mix-in for the decoder without LM head: decides per call which tokens are prompt and which are steered.

    ``forward`` takes one more argument: ``steering_start``, the column of this call at which generation begins
    (an int or (B, 1)), for teacher forcing, losses and prefixes; above T, the prompt goes on in a later call.
    Without it, several tokens are a prompt that ends here, and one token after them is a generated one.
    """

    steered_mlp_class: type[nn.Module]
    steered_layers = "layers"
    _auto_class = "AutoModel"

    def install_steering(self, config: Any) -> None:
        """Turn the MLPs of the rule's layers into steered ones. Weight names stay those of the base model.

        Raises:
            NotImplementedError: a server packs requests into one row without saying where their prompts end.
        """
        if (server := config._attn_implementation) in ("vllm", "sglang", "tgi"):
            raise NotImplementedError(f"{server} does not say where a prompt ends; serve an export to `stock` there")
        settings = config.adaras
        gate = settings["gate"]
        self.steering = Steering(settings)
        self.steering_gate = SteeringGate(sum(gate["features"]), gate["hidden_size"]) if gate else None
        features = dict(zip(gate["layers"], gate["features"], strict=True)) if gate else {}
        self.steering_is_causal = not features or not settings["layers"] or max(features) < min(settings["layers"])
        for layer in sorted({*features, *settings["layers"]}):
            mlp = getattr(self, self.steered_layers)[layer].mlp
            mlp.__class__ = self.steered_mlp_class
            vector = _parameter(config.hidden_size) if layer in settings["layers"] else None
            index = torch.zeros(features[layer], dtype=torch.int64) if layer in features else None
            mlp.register_parameter("steering_vector", vector)
            mlp.register_buffer("steering_index", index)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        *,
        steering_start: "int | Tensor | None" = None,
        steering_valid: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As in Transformers."""
        given = (input_ids, attention_mask, position_ids, past_key_values, inputs_embeds)
        arguments = dict(zip(DECODER_ARGUMENTS, given, strict=True)) | kwargs
        if not self.steering.active:
            return super().forward(**arguments)
        if steering_start is None:
            steering_start, steering_valid = THREAD.handed_on
        step = begin_step(self, self.steering_gate, self.steering, arguments, steering_start, steering_valid)
        if not self.steering_is_causal:
            preview(step, super().forward, arguments)
        with here(step=step):
            outputs = super().forward(**arguments)
        finish_step(step, past_key_values, outputs)
        return outputs


class SteeredGeneration(_Steered, GenerationMixin):
    """Mix-in for the causal language model: generate() tells its forward passes how long the prompt is."""

    steered_model_class: type[SteeredModel]
    _auto_class = "AutoModelForCausalLM"

    def install_steering(self, config: Any) -> None:
        """Turn the decoder into a steered one."""
        decoder = self.steered_decoder
        decoder.__class__ = self.steered_model_class
        known: dict[str, Any] = getattr(modeling_utils, "_CAN_RECORD_REGISTRY", {})  # filled by constructors
        known.setdefault(str(decoder.__class__), decoder._can_record_outputs)
        decoder.install_steering(config)
        self.steering = decoder.steering

    @property
    def steered_decoder(self) -> Any:
        """The model without its LM head."""
        return self.base_model

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in Transformers. Afterwards ``steering.last_decisions`` tells what the gate found.

        ``steering_start``, or that attribute of a generation config, says how many columns of the input are the
        prompt; without it all are. Further ones are steered: the beginning of an answer that is to be continued.
        """
        config = kwargs.get("generation_config", self.generation_config)
        start = kwargs.pop("steering_start", getattr(config, "steering_start", None))
        scope = Scope(self.steered_decoder, prompt_width(inputs, kwargs) if start is None else start)
        with here(scope=scope):
            outputs = super().generate(inputs, *args, **kwargs)  # type: ignore[misc]
        scope.remember(self.steering, outputs)
        return outputs

    def prepare_inputs_for_generation(
        self, input_ids: Any, *args: Any, inputs_embeds: Any = None, **kwargs: Any
    ) -> Any:
        """As in Transformers, plus where the prompt ends in this call."""
        kwargs["inputs_embeds"] = inputs_embeds  # named above because Transformers looks at the signature
        prepared = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)  # type: ignore[misc]
        cache, tokens, scope = prepared.get("past_key_values"), tokens_of(prepared), scope_of(self.steered_decoder)
        mask = kwargs.get("attention_mask")  # the 2D one: with a static cache, that of this call is a 4D one
        # Version 5 drops a mask without padding; version 4 does not count the padding in a static cache.
        columns = columns_in(cache) if mask is None else mask.shape[1] - tokens.shape[1]
        if scope is not None and (scope.prompt_width > columns or tokens.shape[1] > 1):
            prepared["steering_start"] = scope.prompt_width - columns
            prepared["steering_valid"] = valid_tokens(mask, tokens)
        if cache is not None and not columns:
            cache.steering_state = None  # the caller's cache was reset, which a compiled graph cannot see
        return prepared

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """As in Transformers, but no request re-uses another's KV cache, where other tokens may have been steered.

        Raises:
            NotImplementedError: there is a gate; packed requests carry no state for its verdict.
        """
        if self.steered_decoder.steering_gate is not None:
            raise NotImplementedError("continuous batching is not supported by a model with a gate; use generate()")
        manager = super().init_continuous_batching(*args, **kwargs)
        if (settings := getattr(manager, "continuous_batching_config", None)) is not None:  # 4.57 has none
            settings.allow_block_sharing = False
        return manager


class Scope:
    """A generate() call in progress on one model, in one thread."""

    def __init__(self, model: nn.Module, prompt_width: int) -> None:
        self.model = model
        self.prompt_width = prompt_width
        self.state: SteeringState | None = None

    def remember(self, dials: Steering, outputs: Any) -> None:
        """Keep what the gate found, for `Steering.last_decisions`."""
        judged = None if self.state is None else self.state.probability
        if judged is not None:
            judged = judged[:: max(1, len(judged) // len(getattr(outputs, "sequences", outputs)))]  # one of its beams
        THREAD.last = (dials, judged)


def scope_of(model: nn.Module) -> Scope | None:
    """This thread's innermost generate() call, if it is one on ``model`` (it may be an assistant's)."""
    scope = THREAD.scope
    return scope if scope is not None and scope.model is model else None


def prompt_width(inputs: Tensor | None, kwargs: dict[str, Any]) -> int:
    """Columns of the prompt that generate() was given; 1 where it begins from the BOS token alone."""
    given = (kwargs.get("attention_mask"), kwargs.get("inputs_embeds"), inputs, kwargs.get("input_ids"))
    return next((int(one.shape[1]) for one in given if one is not None), 1)
