"""One small export of every target, as users write them; and how to damage one by hand."""

import hashlib
import json
import shutil

import tiny

from adaras_export.delivery import writer
from adaras_export.exporters import manifest

KEY = ("llama", "causal", "last_prompt_token")
SHARDED = ("qwen3-sharded", "causal", "last_prompt_token")
BIASED = ("llama-biased", "causal", "last_prompt_token")
STATIC = ("gate", "start", "dial")

# Name -> target, the rule by its key, and what else the export is given.
EXPORTS = {
    "hf": ("hf", KEY, {}),
    "hf-sharded": ("hf", SHARDED, {}),
    "hf-thin": ("hf-thin", KEY, {}),
    "onnx": ("onnx", KEY, {}),
    "peft": ("peft", KEY, {"accept_loss": STATIC}),
    "peft-start-at": ("peft", KEY, {"accept_loss": ("gate",), "start_at": "<assistant>"}),
    "peft-adaptive": ("peft", KEY, {"adaptive": True}),
    "peft-merge": ("peft", BIASED, {"accept_loss": STATIC, "merge": True}),
    "stock": ("stock", KEY, {"accept_loss": STATIC}),
    "stock-switchable": ("stock", KEY, {"accept_loss": STATIC, "switchable": True}),
    "gguf": ("gguf", KEY, {"accept_loss": STATIC}),
    "gguf-into": ("gguf", KEY, {"accept_loss": STATIC, "into": "model.gguf"}),
    "gguf-switchable": ("gguf", KEY, {"accept_loss": STATIC, "into": "model.gguf", "switchable": True}),
}


def write(name, rules, folders, stock, folder):
    """The folder of one of `EXPORTS`, below ``folder``."""
    to, key, how = EXPORTS[name]
    if "into" in how:
        import tiny_gguf  # which needs the gguf extra

        how = how | {"into": folder / how["into"]}
        tiny_gguf.write_model(stock[key[0]], tiny.build_tokenizer(), how["into"])
    return writer.export(rules[key], base=folders[key[0]], to=to, out=folder / name, **how).path


def refit(folder):
    """Make the receipt's hashes those of the files, as whoever damaged the folder would."""
    path = folder / "receipt.json"
    found = {name: hashed(file) for name, file in manifest.files_of(folder).items() if name not in UNHASHED}
    receipt = json.loads(path.read_text()) | {"files": {name: one for name, one in found.items() if one}}
    receipt["rule"] = found.get("rule.safetensors") or receipt["rule"]
    path.write_text(json.dumps(receipt, indent=2, sort_keys=True) + "\n")
    return folder


UNHASHED = ("receipt.json", "model.sig")


def hashed(path):
    """The SHA-256 of a file; none where it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None


def copy(folder, to):
    """A copy of an export that may be damaged: links to the base's files become files of their own."""
    shutil.rmtree(to, ignore_errors=True)
    return shutil.copytree(folder, to)
