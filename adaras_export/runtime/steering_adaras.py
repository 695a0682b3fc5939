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
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, modeling_utils
from transformers.cache_utils import Cache


class _Local(threading.local):
    """What belongs to the forward pass of a thread; there from the start, or a compiled one is compiled twice."""

    def __init__(self) -> None:
        self.step: Step | None = None
        self.handed_on: tuple[int | Tensor | None, Tensor | None] | None = None
        self.off: tuple[int, ...] = ()


_LOCAL = _Local()


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


class SteeringState:
    """What the gate has seen of a batch of sequences; an attribute of their KV cache.

    ``probability`` is p(correct), (B,), or None before the first prompt token and where there is no gate.
    """

    def __init__(self) -> None:
        self.weighted_BF: Tensor | None = None
        self.weight_B1: Tensor | None = None
        self.probability: Tensor | None = None

    def see(self, gate: SteeringGate, features_BTF: Tensor, prompt_BT: Tensor) -> None:
        """Take further prompt tokens into account."""
        weighted_BF, weight_B1 = gate.pool(features_BTF, prompt_BT)
        if self.weighted_BF is not None and self.weight_B1 is not None:
            weighted_BF, weight_B1 = self.weighted_BF + weighted_BF, self.weight_B1 + weight_B1
        self.weighted_BF, self.weight_B1 = weighted_BF, weight_B1
        self.probability = gate(weighted_BF / weight_B1)

    def probability_of(self, batch_size: int) -> Tensor:
        """p(correct) for a batch that may hold each sequence several times in a row (beams)."""
        if self.probability is None:
            raise ValueError("the gate has not seen the prompt: pass it through this model, with this KV cache")
        copies, rest = divmod(batch_size, len(self.probability))
        if rest:
            raise ValueError(f"the KV cache belongs to {len(self.probability)} sequences; the batch has {batch_size}")
        return self.probability.repeat_interleave(copies) if copies > 1 else self.probability


class Step:
    """One forward pass: collects the gate's features, then says how much each token is steered."""

    def __init__(self, state: SteeringState, gate: SteeringGate | None, strength: float, threshold: float) -> None:
        self.state = state
        self.gate = gate
        self.strength = strength
        self.threshold = threshold
        self.prompt_BT: Tensor | None = None
        self.steered_BT: Tensor | None = None
        self.anything_steered = True
        self._features: list[Tensor] = []
        self._scale: Tensor | None = None

    def place(self, start: "int | Tensor", offset: int, valid_BT: Tensor) -> None:
        """Say which tokens are prompt and which are steered.

        ``start`` is the column of this call, an int or (B, 1), at which generation begins: below 1 where the prompt
        ended earlier, above T where it goes on later. ``offset`` is 1 where the last prompt token is steered too.
        """
        column_T = torch.arange(valid_BT.shape[1], device=valid_BT.device)
        if isinstance(start, Tensor) or start > 0:
            self.prompt_BT = valid_BT & (column_T < start)
        self.steered_BT = valid_BT & (column_T >= start - offset)
        self.anything_steered = isinstance(start, Tensor) or start - offset < valid_BT.shape[1]

    def place_packed(self, last_R: Tensor, ends_R: Tensor, position_1T: Tensor, offset: int) -> None:
        """Say which tokens are steered where several requests share one row, as in continuous batching.

        ``last_R`` are the columns whose logits choose a token, ``ends_R`` where each request ends, with a 0 before.
        A request of several columns is a prompt or a piece of one; so is the first token of all.
        """
        column_T = torch.arange(position_1T.shape[1], device=position_1T.device)
        self.steered_BT = (column_T[:, None] == last_R).any(1)[None]
        if not offset:
            single_R = torch.where(ends_R[1:] - ends_R[:-1] == 1, ends_R[1:] - 1, -1)
            self.steered_BT = self.steered_BT & (column_T[:, None] == single_R).any(1) & (position_1T > 0)

    def read(self, features_BTf: Tensor) -> None:
        """Take one layer's gate features, in the order of the layers."""
        if self.prompt_BT is not None:
            self._features.append(features_BTf)

    def settle(self) -> None:
        """Let the gate judge what was read."""
        if self._features and self.gate is not None and self.prompt_BT is not None:
            with torch.no_grad():  # or a layer that is computed again would lack what was saved here
                self.state.see(self.gate, torch.cat(self._features, dim=-1), self.prompt_BT)
            self._features, self.prompt_BT = [], None  # what is computed again for a gradient is not read again

    def scale(self, like: Tensor) -> Tensor | None:
        """strength * g per token, (B, T, 1) or broadcastable to it, float32; None where nothing is steered."""
        if not self.anything_steered:
            return None
        if self._scale is None:
            self.settle()
            self._scale = self._settled_scale(like)
        return self._scale.to(like.device)

    def _settled_scale(self, like: Tensor) -> Tensor:
        steered = torch.ones(1, 1, device=like.device) if self.steered_BT is None else self.steered_BT.float()
        if self.gate is not None:
            probability_B = self.state.probability_of(like.shape[0])
            steered = steered * (probability_B < self.threshold).float().unsqueeze(1).to(steered.device)
        return (self.strength * steered).unsqueeze(-1)


def prompt_ends(valid_BT: Tensor) -> Tensor:
    """The column after each row's last valid token, (B, 1), for padding on either side."""
    return valid_BT.shape[1] - valid_BT.flip(1).int().argmax(1, keepdim=True)


def valid_tokens(attention_mask: Any, tokens: Tensor) -> Tensor:
    """Which tokens (B, T, ...) of this call are no padding, (B, T) bool, from a 2D attention mask or None."""
    if attention_mask is None:
        return torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2:
        raise ValueError("steering needs a 2D attention mask (1 token, 0 padding) where a call has several tokens")
    return attention_mask[:, -tokens.shape[1] :].bool()


def begin_step(
    model: nn.Module,
    gate: SteeringGate | None,
    dials: "Steering",
    arguments: dict[str, Any],
    start: "int | Tensor | None" = None,
    valid_BT: Tensor | None = None,
) -> Step:
    """The step of a forward pass of ``model`` with these arguments.

    Raises:
        ValueError: the mask is not 2D, or the KV cache was filled without the gate.
    """
    cache = arguments["past_key_values"]
    tokens = arguments["input_ids"] if arguments["inputs_embeds"] is None else arguments["inputs_embeds"]
    state, fresh = _state_of(model, cache, gated=gate is not None)
    step = Step(state, gate, dials.strength, dials.threshold)
    offset = int(dials.start == "last_prompt_token")
    if (last_R := arguments.get("logits_indices")) is not None:  # continuous batching
        step.place_packed(last_R, arguments["cu_seq_lens_q"], arguments["position_ids"], offset)
    elif tokens.shape[1] > 1 or fresh or start is not None:
        if valid_BT is None:
            valid_BT = valid_tokens(arguments["attention_mask"], tokens)
        step.place(prompt_ends(valid_BT) if start is None else start, offset, valid_BT)
    return step


def preview(step: Step, forward: Callable[..., Any], arguments: dict[str, Any]) -> None:
    """Let a gate that reads steered layers see the prompt first, where a call holds prompt and steered tokens.

    Raises:
        ValueError: earlier prompt tokens are in the KV cache, which this extra pass must not touch.
    """
    if step.prompt_BT is None or step.steered_BT is None:
        return
    step.anything_steered = bool((step.steered_BT & ~step.prompt_BT).any())
    if not step.anything_steered:
        return
    cache = arguments["past_key_values"]
    if cache is not None and _length(cache):
        raise ValueError("this gate needs the prompt in calls of its own: it reads layers that are steered")
    look = Step(step.state, step.gate, 0.0, 0.0)
    look.prompt_BT, look.anything_steered = step.prompt_BT, False
    with running(look):
        forward(**{**arguments, "past_key_values": None, "use_cache": False})
    look.settle()
    step.prompt_BT = None


def finish_step(step: Step, cache: Cache | None, outputs: Any) -> None:
    """Let the gate judge what no steered layer asked for, and hand the state to the KV cache."""
    step.settle()
    if cache is None:
        candidates = outputs if isinstance(outputs, tuple) else (getattr(outputs, "past_key_values", None),)
        cache = next((one for one in candidates if isinstance(one, Cache)), None)
    if cache is not None:
        cache.steering_state = step.state  # type: ignore[attr-defined]


class Steering:
    """The dials of a steered model: ``model.steering``. Shared by all calls on that model.

    ``strength``, ``threshold`` and ``enabled`` may be set; 0 and False give the base model's output, bit for bit.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = settings
        self.enabled = True

    @property
    def strength(self) -> float:
        """Factor on every steering vector; negative reverses the direction."""
        return float(self._settings["strength"])

    @strength.setter
    def strength(self, value: float) -> None:
        self._settings["strength"] = float(value)

    @property
    def threshold(self) -> float:
        """Sequences with p(correct) below it are steered; without a gate all are."""
        return float(self._settings["threshold"])

    @threshold.setter
    def threshold(self, value: float) -> None:
        self._settings["threshold"] = float(value)

    @property
    def start(self) -> str:
        """The first steered token: "last_prompt_token" or "first_generated_token"."""
        return str(self._settings["start"])

    @contextmanager
    def off(self) -> Iterator[None]:
        """The base model, in this thread, for as long as the context lasts; ``enabled`` is for all threads."""
        before = _LOCAL.off
        _LOCAL.off = (*before, id(self))
        try:
            yield
        finally:
            _LOCAL.off = before

    @property
    def active(self) -> bool:
        """Whether this thread's calls are steered."""
        return self.enabled and id(self) not in _LOCAL.off

    @property
    def last_decisions(self) -> list[tuple[float, bool]]:
        """(p(correct), steered) of each row of what this thread's last generate() gave; empty without a gate."""
        owner, judged = getattr(_LOCAL, "last", (None, None))
        return [] if judged is None or owner is not self else [(p, p < self.threshold) for p in judged.tolist()]


class SteeredMLP:
    """Mix-in for an MLP: its forward hands h and the untouched down projection to `steered_down`."""

    steering_vector: Tensor | None
    steering_index: Tensor | None

    def steered_down(self, hidden_BTM: Tensor, down: nn.Module) -> Tensor:
        """The down projection, plus the steering vector at the steered tokens."""
        output_BTD: Tensor = down(hidden_BTM)
        step = _LOCAL.step
        if step is None:  # switched off
            return output_BTD
        if self.steering_index is not None:
            step.read(hidden_BTM.detach().index_select(-1, self.steering_index))
        if self.steering_vector is None or (scale := step.scale(output_BTD)) is None:
            return output_BTD
        return output_BTD + (scale * self.steering_vector).to(output_BTD.dtype)


class SteeredGatedMLP(SteeredMLP):
    """The MLP that most families have: an activated gate times an up projection."""

    def forward(self, x: Tensor) -> Tensor:
        """As the base does, up to the down projection."""
        own: Any = self
        return self.steered_down(own.act_fn(own.gate_proj(x)) * own.up_proj(x), own.down_proj)


def _inherit_key_conversions(cls: type[PreTrainedModel]) -> None:
    """Have checkpoint keys renamed as for the class that ``cls`` steers.

    Transformers 5 looks the renaming up by class name, and skips classes that are not its own.
    """
    try:
        from transformers import conversion_mapping as known
    except ImportError:  # Transformers 4
        return
    native: Any = next(parent for parent in cls.__mro__ if parent.__module__.startswith("transformers."))
    if native.config_class is None:  # ``cls`` is a mix-in
        return
    for name in (native.__name__, native.config_class.model_type):
        rules = known.get_checkpoint_conversion_mapping(name)
        if rules is not None:
            known.register_checkpoint_conversion_mapping(cls.__name__, rules, overwrite=True)
            return


class _Steered(PreTrainedModel):
    """What decoder and causal language model share: their place in the Transformers library."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _inherit_key_conversions(cls)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in Transformers, which makes every parameter trainable; gate and vectors stay frozen."""
        # Else version 4 leaves buffers of layers on disk as they are: the gate's indices would be zero.
        loaded = super().from_pretrained(*args, **{"offload_buffers": True, **kwargs})
        for name, parameter in (loaded[0] if isinstance(loaded, tuple) else loaded).named_parameters():
            parameter.requires_grad &= "steering_" not in name
        return loaded

    def keep_steering_in_float32(self) -> None:
        """Gate and vectors stay float32 when the model is loaded in half precision.

        On the instance, after construction: Transformers 4.57 checks the class's list against modules that exist.
        """
        kept = set(self._keep_in_fp32_modules_strict or ())
        self._keep_in_fp32_modules_strict = kept | {"steering_gate", "steering_vector"}

    def _set_gradient_checkpointing(  # type: ignore[override]
        self, *, gradient_checkpointing_func: Callable[..., Any] = checkpoint, **kwargs: Any
    ) -> None:
        """Steer a layer that is computed again for its gradient as it was steered the first time."""

        def steered(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
            step = _LOCAL.step

            def again(*inputs: Any, **named: Any) -> Any:
                with running(step):
                    return function(*inputs, **named)

            return gradient_checkpointing_func(again, *args, **options)

        super()._set_gradient_checkpointing(gradient_checkpointing_func=steered, **kwargs)


class SteeredModel(_Steered):
    """Mix-in for the decoder without LM head: decides per call which tokens are prompt and which are steered.

    ``forward`` takes one more argument: ``steering_start``, the column of this call at which generation begins
    (an int or (B, 1)), for teacher forcing, losses and prefixes; above T, the prompt goes on in a later call.
    Without it, several tokens are a prompt that ends here, and one token after them is a generated one.
    """

    steered_mlp_class: type[nn.Module]
    steered_layers = "layers"
    steering: Steering
    steering_gate: SteeringGate | None

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.install_steering(config)

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
        self.keep_steering_in_float32()

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
        arguments = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            **kwargs,
        }
        if not self.steering.active:
            return super().forward(**arguments)
        if steering_start is None and _LOCAL.handed_on is not None:
            steering_start, steering_valid = _LOCAL.handed_on
        step = begin_step(self, self.steering_gate, self.steering, arguments, steering_start, steering_valid)
        if not self.steering_is_causal:
            preview(step, super().forward, arguments)
        with running(step):
            outputs = super().forward(**arguments)
        finish_step(step, past_key_values, outputs)
        return outputs


class SteeredGeneration(_Steered):
    """Mix-in for the causal language model: generate() tells its forward passes how long the prompt is."""

    steered_model_class: type[SteeredModel]
    steered_decoder_name = "model"
    steering: Steering

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # the Transformers class comes next in line
        decoder = self.steered_decoder
        decoder.__class__ = self.steered_model_class
        known: dict[str, Any] = getattr(modeling_utils, "_CAN_RECORD_REGISTRY", {})  # filled by constructors
        known.setdefault(str(decoder.__class__), decoder._can_record_outputs)
        decoder.install_steering(config)
        self.steering = decoder.steering
        self.keep_steering_in_float32()

    @classmethod
    def can_generate(cls) -> bool:
        """Yes. Transformers asks parent classes too, and would warn of this one at every loading."""
        return True

    @property
    def steered_decoder(self) -> SteeredModel:
        """The model without its LM head."""
        decoder: SteeredModel = getattr(self, self.steered_decoder_name)
        return decoder

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in Transformers. Afterwards ``steering.last_decisions`` tells what the gate found.

        ``steering_start``, or that attribute of a generation config, says how many columns of the input are the
        prompt; without it all are. Further ones are steered: the beginning of an answer that is to be continued.
        """
        config = kwargs.get("generation_config", self.generation_config)
        start = kwargs.pop("steering_start", getattr(config, "steering_start", None))
        with generating(self.steered_decoder, prompt_width(inputs, kwargs) if start is None else start) as scope:
            outputs = super().generate(inputs, *args, **kwargs)  # type: ignore[misc]
        scope.remember(self.steering, outputs)
        return outputs

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        *args: Any,
        attention_mask: Any = None,
        inputs_embeds: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As in Transformers, plus where the prompt ends in this call."""
        prepared: dict[str, Any] = super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids, *args, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs
        )
        scope = current_scope(self.steered_decoder)
        tokens = prepared.get("inputs_embeds")
        tokens = prepared["input_ids"] if tokens is None else tokens
        two_dimensional = isinstance(attention_mask, Tensor) and attention_mask.ndim == 2
        cache = prepared.get("past_key_values")
        if two_dimensional:
            width = attention_mask.shape[1]
        else:  # Transformers 5 drops a mask without padding
            width = tokens.shape[1] + (0 if cache is None else int(cache.get_seq_length()))
        start = 0 if scope is None else scope.prompt_width - (width - tokens.shape[1])
        if scope is not None and (start > 0 or tokens.shape[1] > 1):
            prepared["steering_start"] = start
            if attention_mask is None or two_dimensional:  # a static cache turns the mask of this call into a 4D one
                prepared["steering_valid"] = valid_tokens(attention_mask, tokens)
        if cache is not None and width == tokens.shape[1]:
            cache.steering_state = None  # the caller's cache was reset
        return prepared

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """As in Transformers, but no request re-uses another's KV cache, where other tokens may have been steered.

        Raises:
            NotImplementedError: there is a gate; packed requests carry no state for its verdict.
        """
        if self.steered_decoder.steering_gate is not None:
            raise NotImplementedError("continuous batching is not supported by a model with a gate; use generate()")
        manager = super().init_continuous_batching(*args, **kwargs)  # type: ignore[misc]
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
        _LOCAL.last = (dials, judged)


@contextmanager
def generating(model: nn.Module, width: int) -> Iterator[Scope]:
    """Remember, for this thread, that ``model`` generates from a prompt of ``width`` columns."""
    stack = _LOCAL.__dict__.setdefault("scopes", [])
    stack.append(Scope(model, width))
    try:
        yield stack[-1]
    finally:
        stack.pop()


def current_scope(model: nn.Module) -> Scope | None:
    """The innermost generate() call of this thread, if it is one on ``model`` (it may be an assistant's)."""
    stack = getattr(_LOCAL, "scopes", None)
    return stack[-1] if stack and stack[-1].model is model else None


def prompt_width(inputs: Tensor | None, kwargs: dict[str, Any]) -> int:
    """Columns of the prompt that generate() was given; 1 where it begins from the BOS token alone."""
    for given in (kwargs.get("attention_mask"), kwargs.get("inputs_embeds"), inputs, kwargs.get("input_ids")):
        if given is not None:
            return int(given.shape[1])
    return 1


@contextmanager
def handing_on(start: "int | Tensor | None", valid_BT: Tensor | None) -> Iterator[None]:
    """Tell the decoder what its caller has no argument for."""
    before = _LOCAL.handed_on
    _LOCAL.handed_on = (start, valid_BT)
    try:
        yield
    finally:
        _LOCAL.handed_on = before


@contextmanager
def running(step: "Step | None") -> Iterator[None]:
    """Make ``step`` the forward pass of this thread."""
    before = _LOCAL.step
    _LOCAL.step = step
    try:
        yield
    finally:
        _LOCAL.step = before


def running_step() -> Step:
    """The forward pass of this thread."""
    assert _LOCAL.step is not None
    return _LOCAL.step


def _parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape, dtype=torch.float32), requires_grad=False)


def _state_of(model: nn.Module, cache: Cache | None, *, gated: bool) -> tuple[SteeringState, bool]:
    """The state of a call's sequences, and whether it begins with this call."""
    state: SteeringState | None = getattr(cache, "steering_state", None)
    length = 0 if cache is None else _length(cache)
    fresh = state is None if length is None else length == 0
    if state is None and gated and length:
        raise ValueError("past_key_values was filled without the gate; fill it through this model, with steering on")
    state = SteeringState() if state is None or fresh else state
    scope = current_scope(model)
    if scope is not None and scope.state is None:  # later ones may be of other prompts: guidance_scale has an empty one
        scope.state = state
    return state, fresh


def _length(cache: Cache) -> int | None:
    """Columns in a KV cache; None inside a compiled graph, where a static cache knows it as a tensor only."""
    length = cache.get_seq_length()
    return None if isinstance(length, Tensor) and torch.compiler.is_compiling() else int(length)
