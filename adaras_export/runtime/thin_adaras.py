"""Opens a steered repository that holds no weights of the base model: they are loaded from where its config says.

The repository has the classes of steering_adaras.py, the tensors that steering adds, and in its config the base's
id with a pinned revision, or its path, and a fingerprint. A base with other tensors is refused. What opens is an
ordinary steered model; `save_pretrained` writes it with all weights, and then nothing refers to the base.
"""

import copy
import hashlib
import json
import sys
from contextlib import ExitStack
from typing import Any, ClassVar

import torch
from safetensors import safe_open
from torch import nn
from transformers import GenerationConfig, PretrainedConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.auto_factory import add_generation_mixin_to_remote_model
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

_STEERING_FILE = "model-steering.safetensors"
_HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "token")
_OTHER_WEIGHTS = ("state_dict", "variant", "gguf_file", "key_mapping")  # what would be loaded is not what was checked
_REMEDY = "say where it is: from_pretrained(..., base=...)"
_SAMPLE_BYTES = 4096


class ThinConfig:
    """The config class that `AutoConfig` finds; its `from_pretrained` returns an instance of the real class's subclass.

    It needs a class of its own, because Transformers 5 chooses the model class by the config class, and a full
    repository in a local folder of the same name has the same config class.
    """

    _classes: ClassVar[dict[type, Any]] = {}

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """The real classes know theirs."""

    @classmethod
    def from_pretrained(cls, repo: Any, **kwargs: Any) -> Any:
        """As in Transformers."""
        settings, _ = PretrainedConfig.get_config_dict(repo, **kwargs)
        where = {name: kwargs[name] for name in (*_HUB, "revision") if name in kwargs}
        real = get_class_from_dynamic_module(settings["adaras"]["base"]["auto_map"]["AutoConfig"], repo, **where)
        if real not in cls._classes:
            cls._classes[real] = type(real.__name__, (real,), {"__module__": real.__module__, "steered_class": real})
        return cls._classes[real].from_pretrained(repo, **kwargs)


class _Thin:
    """The model class that `AutoModel` finds; its `from_pretrained` returns a model of the real class."""

    auto_class: str

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """The real classes know theirs."""

    @classmethod
    def from_pretrained(cls, repo: Any, *args: Any, config: Any, base: Any = None, **kwargs: Any) -> Any:
        """As in Transformers; ``base`` is the folder or Hub id of the base model, if it is not where the config says.

        Raises:
            OSError: the base model is not there.
            ValueError: it is another model, or lacks weights, or the steering tensors do not fit the config.
        """
        config = copy.deepcopy(config)
        config.__class__ = config.steered_class
        settings = config.adaras = dict(config.adaras)
        record = settings.pop("base")
        config.auto_map = dict(record["auto_map"])
        # The config's module is the repository's code at the requested revision; the model classes are in it, too.
        real = getattr(sys.modules[type(config).__module__], record["auto_map"][cls.auto_class].rpartition(".")[2])
        real = add_generation_mixin_to_remote_model(real)  # as AutoModel does
        if strange := [name for name in _OTHER_WEIGHTS if kwargs.get(name) is not None]:
            raise ValueError(f"{', '.join(strange)}: not possible here, the base model's own weights are pinned")
        source = record["id"] if base is None else str(base)
        pinned = record["revision"] if source == record["id"] else None
        hub = {name: kwargs[name] for name in _HUB if name in kwargs}
        own = {name: kwargs.pop(name) for name in ("revision", "subfolder") if name in kwargs} | hub
        _require_fingerprint(source, _checkpoint(source, pinned, hub), record["fingerprint"])
        # If it is given, Transformers does not look for settings or custom_generate/generate.py at the base.
        generation = kwargs["generation_config"] = kwargs.get("generation_config") or _generation(repo, config, own)
        kwargs.pop("adapter_kwargs", None)  # they have the revision of this repository
        config._commit_hash = None  # and so has this
        reported = kwargs.pop("output_loading_info", False)
        kwargs |= {"trust_remote_code": False, "use_safetensors": True}  # this repository is trusted, not the base
        model, report = _without_steering(real).from_pretrained(
            source,
            *args,
            config=config,
            revision=pinned or "main",
            output_loading_info=True,
            **kwargs,
        )
        if report["missing_keys"]:
            raise ValueError(
                f"{source}: {real.__name__} finds no {', '.join(sorted(report['missing_keys'])[:3])}, ... there"
            )
        model.__class__ = real
        if model.can_generate():
            model.generation_config = generation  # Transformers 4.57 copies it, and loses what generate() asks for
        model.config.name_or_path = model.name_or_path = str(repo)
        _fill(getattr(model, "steered_decoder", model), cached_file(repo, _STEERING_FILE, **own))
        return (model, report) if reported else model


class ThinModel(_Thin):
    """The decoder."""

    auto_class = "AutoModel"


class ThinModelForCausalLM(_Thin):
    """The decoder with its language model head."""

    auto_class = "AutoModelForCausalLM"


def _without_steering(real: type) -> Any:
    """``real`` without warnings about missing steering tensors, which are loaded afterwards."""
    missing = [*(getattr(real, "_keys_to_ignore_on_load_missing", None) or ()), r"steering_(vector|index|gate)"]
    return type(real.__name__, (real,), {"__module__": real.__module__, "_keys_to_ignore_on_load_missing": missing})


def _checkpoint(source: str, revision: str | None, hub: dict[str, Any]) -> dict[str, str]:
    """The file of each tensor, or one file for all under the name ""; looked for in the order of Transformers."""
    where = {"revision": revision, **hub}
    try:
        single, index = (
            cached_file(source, name, _raise_exceptions_for_missing_entries=False, **where)
            for name in ("model.safetensors", "model.safetensors.index.json")
        )
        if single is not None:
            return {"": single}
        if index is None:
            raise OSError("no model.safetensors and no index there")  # noqa: TRY301 - one message for all
        paths, metadata = get_checkpoint_shard_files(source, index, **where)
        by_name = {path.replace("\\", "/").rpartition("/")[2]: path for path in paths}
        return {name: by_name[file] for name, file in metadata["weight_map"].items()}
    except (OSError, ValueError, KeyError) as error:  # ValueError: a path that is gone is no valid Hub id either
        reason = str(error).strip().partition("\n")[0]
        raise OSError(f"{source}: the base model's weights are not there ({reason}); {_REMEDY}") from error


def _require_fingerprint(source: str, located: dict[str, str], expected: str) -> None:
    """Raise ValueError for a base with other tensors than the base that this repository was made for.

    SHA-256 over every tensor's name, type, shape and the head, middle and tail of its bytes. The files are mapped
    into memory, so that only the samples are read: milliseconds, whatever the size.
    """
    digest = hashlib.sha256()
    with ExitStack() as stack:
        files = {path: stack.enter_context(safe_open(path, framework="pt")) for path in sorted({*located.values()})}
        if "" in located:
            located = dict.fromkeys(files[located[""]].keys(), located[""])
        for name in sorted(located):
            piece, tensor = files[located[name]].get_slice(name), files[located[name]].get_tensor(name)
            digest.update(json.dumps([name, piece.get_dtype(), list(piece.get_shape())]).encode())
            bytes_N = tensor.reshape(-1).view(torch.uint8)
            for position in (0, (len(bytes_N) - _SAMPLE_BYTES) // 2, len(bytes_N) - _SAMPLE_BYTES):
                digest.update(bytes_N[max(0, position) :][:_SAMPLE_BYTES].numpy().tobytes())
    if digest.hexdigest() != expected:
        raise ValueError(
            f"{source}: is not the base model that this repository was made for: its tensors have the fingerprint "
            f"{digest.hexdigest()[:12]}; expected {expected[:12]}; {_REMEDY}"
        )


def _generation(repo: Any, config: Any, own: dict[str, Any]) -> GenerationConfig:
    """The generation settings of this repository."""
    try:
        found: GenerationConfig = GenerationConfig.from_pretrained(repo, **own)
    except OSError:  # it has none
        found = GenerationConfig.from_model_config(config)
    return found


def _fill(decoder: nn.Module, path: str | None) -> None:
    """Put the tensors of the steering file into the decoder; every tensor must have a place, and every place one."""
    with safe_open(path, framework="pt") as file:
        given = {name: file.get_tensor(name).clone() for name in file.keys()}
    places = {name: tensor for name, tensor in decoder.state_dict(keep_vars=True).items() if "steering_" in name}
    wrong = sorted(places.keys() ^ given.keys())
    wrong += [name for name in places if name in given and places[name].shape != given[name].shape]
    if wrong:
        raise ValueError(
            f"{path}: missing, unknown or of another shape: {', '.join(wrong)}; expected those of the config"
        )
    if offloaded := sorted(name for name, tensor in places.items() if tensor.is_meta):
        raise ValueError(f"{', '.join(offloaded)}: offloaded; save_pretrained() the model first and offload that")
    for name, tensor in places.items():
        # Replaced, not copied: Transformers created the missing tensors in the dtype of the other weights.
        owner, _, key = name.rpartition(".")
        value: Any = given[name].to(tensor.device)
        if value.is_floating_point():
            value = nn.Parameter(value, requires_grad=False)
        setattr(decoder.get_submodule(owner), key, value)
