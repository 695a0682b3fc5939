"""Opens pushed artifacts by repository and commit, as their users do. Run as a script, never imported.

Reads {"library": whether adaras_export may be imported, "jobs": [{"how", "name", "revision"}], ...} as JSON from
standard input and prints one result per job, as JSON on the last line: what generate() gave, or the error in one line.
"""

import json
import sys
from pathlib import Path

ASKED = json.load(sys.stdin)
sys.path[0] = str(Path(__file__).parents[1] / "runtimes" / "drivers")
if not ASKED["library"]:
    sys.modules["adaras_export"] = None  # importing it fails from here on

import torch  # noqa: E402
import transformers  # noqa: E402

torch.set_num_threads(1)
FLOAT32 = {"dtype": torch.float32}


def greedy(model):
    rows, pad = ASKED["rows"], ASKED["pad"]
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    how = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": pad}
    how |= {"return_dict_in_generate": True, "output_logits": True}
    out = model.eval().generate(input_ids=ids, attention_mask=mask, **how)
    return {"sequences": out.sequences.tolist(), "logits": torch.stack(out.logits).tolist()}


def steered(name, revision):
    return greedy(opened(name, revision, trust_remote_code=True))


def stock(name, revision):
    return greedy(opened(name, revision))


def opened(name, revision, **how):
    return transformers.AutoModelForCausalLM.from_pretrained(name, revision=revision, **FLOAT32, **how)


def peft(name, revision):
    from peft import PeftConfig, PeftModel

    place = PeftConfig.from_pretrained(name, revision=revision)
    base = opened(place.base_model_name_or_path, place.revision)  # the base's, whatever revision names the adapter
    return greedy(PeftModel.from_pretrained(base, name, revision=revision))


def adaptive(name, revision):
    import adaras_export.exporters.peft.method  # noqa: F401

    return peft(name, revision)


def snapshot(name, revision):
    from huggingface_hub import snapshot_download

    return snapshot_download(name, revision=revision)


def onnx(name, revision):
    import run_onnxruntime

    state = {"end": ASKED["end"], "steps": 6, "state": ASKED["state"]}
    job = {**ASKED, **state, "folder": snapshot(name, revision)}
    return run_onnxruntime.run(job, ASKED["rows"])


def gguf(name, revision):
    from gguf import GGUFReader
    from huggingface_hub import hf_hub_download

    path = hf_hub_download(name, "control-vector.gguf", revision=revision)
    return {tensor.name: tensor.data.tolist() for tensor in GGUFReader(path).tensors}


def done(job):
    try:
        return globals()[job["how"]](job["name"], job["revision"])
    except Exception as error:  # noqa: BLE001 - whatever it is, it is reported
        return f"{type(error).__name__}: {error}"


print("\n" + json.dumps([done(job) for job in ASKED["jobs"]], default=lambda value: value.tolist()))
