"""One small export of every target, as users write them; and how to damage one by hand."""

import json
import os
import shutil

import tiny

from adaras_export import delivery, receipts, storage

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
    "peft-adaptive": ("peft", KEY, {"adaptive": True}),
    "peft-merge": ("peft", BIASED, {"accept_loss": STATIC, "merge": True}),
    "stock": ("stock", KEY, {"accept_loss": STATIC}),
    "stock-switchable": ("stock", KEY, {"accept_loss": STATIC, "switchable": True}),
    "gguf": ("gguf", KEY, {"accept_loss": STATIC}),
    "gguf-into": ("gguf", KEY, {"accept_loss": STATIC, "into": "model.gguf"}),
}


def write(name, rules, folders, stock, folder):
    """The folder of one of `EXPORTS`, below ``folder``."""
    to, key, how = EXPORTS[name]
    if "into" in how:
        import tiny_gguf  # which needs the gguf extra

        how = how | {"into": folder / how["into"]}
        tiny_gguf.write_model(stock[key[0]], tiny.build_tokenizer(), how["into"])
    return delivery.export(rules[key], base=folders[key[0]], to=to, out=folder / name, **how).path


def refit(folder):
    """Make the receipt's hashes those of the files, as whoever damaged the folder would."""
    path = folder / "receipt.json"
    files = {
        name: file for name, file in receipts.files_of(folder).items() if name not in ("receipt.json", "model.sig")
    }
    found = {name: storage.sha256_file(file) for name, file in files.items()}
    receipt = json.loads(path.read_text()) | {"files": found}
    if (folder / "rule.safetensors").is_file():
        receipt["rule"] = storage.sha256_file(folder / "rule.safetensors")
    path.write_text(json.dumps(receipt, indent=2, sort_keys=True) + "\n")
    return folder


def copy(folder, to):
    """A copy of an export that may be damaged: links to the base's files become files of their own."""
    shutil.rmtree(to, ignore_errors=True)
    return shutil.copytree(folder, to)


def files(folder):
    """The names of the files of an export, but its receipt."""
    return sorted(name for name in receipts.files_of(folder) if name != "receipt.json")


def replace_by_pipe(path):
    """Put a pipe in a file's place, which would be waited for for ever."""
    path.unlink(missing_ok=True)
    os.mkfifo(path)
