"""Whether Transformers can build what a base's config.json describes, and whether its weights fit: tried on no memory.

A config is foreign, and its sizes are believed: asked to open it, Transformers makes room first, and what it raises for
a value that it cannot use is of any type. Knows no rule.
"""

from pathlib import Path
from typing import Any

from adaras_export.errors import ArtifactError, first_line
from adaras_export.models import decoder_key, family_of, header, shards
from adaras_export.storage import read_json

# What its config classes, module constructors and PyTorch raise for a text, a zero or a list in place of a size.
_BAD_SIZES = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def require(folder: Path) -> None:
    """Refuse a base that Transformers would not open, or only after making room for what its weights are not.

    Raises:
        ArtifactError: as said.
        UnsupportedModelError: the architecture is not in the table.
    """
    path = folder / "config.json"
    config = read_json(path)
    family = family_of(config, str(folder))
    expected = _shapes(path, config, family.model_type)
    if "quantization_config" in config:  # packed into other shapes
        return
    located = shards(folder)
    prefix = "" if decoder_key(family.model_type, located) else f"{family.decoder}."
    headers = {file: header(file) for file in {*located.values()}}
    for name, file in located.items():
        found = headers[file].get(name, {}).get("shape")
        if found != expected.get(prefix + name, expected.get(name, found)):
            wanted = expected.get(prefix + name, expected.get(name))
            raise ArtifactError(f"{file}: {name} has shape {found}; expected {wanted}, as config.json says")


def _shapes(path: Path, config: dict[str, Any], family: str) -> dict[str, list[int]]:
    """The shape of each tensor of the model that a config describes, by name."""
    import torch
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, __version__

    left_out = ("auto_map", "model_type", "quantization_config")
    plain = {key: value for key, value in config.items() if key not in left_out}
    auto: Any = AutoModelForCausalLM
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            model = auto.from_config(CONFIG_MAPPING[family].from_dict(plain))
    except (*_BAD_SIZES, OSError, StrictDataclassError) as error:
        raise ArtifactError(
            f"{path}: {first_line(error)}; expected a config that transformers {__version__} can build a {family} from"
        ) from error
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
