"""Opens exports as their users do, in a process that cannot import the library. Run as a script, never imported.

Reads a list of jobs as JSON from standard input, each {"folder", "prompts", "pad", "end", "modes"}, and prints the
results as JSON on the last line, one {mode: result} per job. Repositories without code of their own ("trust": false)
are opened without trust.
"""

import json
import pickle
import sys

sys.modules["adaras_export"] = None  # importing it fails from here on

import torch  # noqa: E402
import transformers  # noqa: E402

torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()
TRUST = {"trust_remote_code": True, "dtype": torch.float32}


def padded(rows, pad):
    width = max(map(len, rows))
    ids = [[pad] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def generate(model, job, rows, **how):
    settings = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": job["pad"], **how}
    out = model.generate(**padded(rows, job["pad"]), return_dict_in_generate=True, output_logits=True, **settings)
    found = {"sequences": out.sequences.tolist(), "logits": torch.stack(out.logits).tolist()}
    return {**found, "decisions": model.steering.last_decisions} if job.get("trust", True) else found


def sampled(model, job):
    results = []
    for row in job["prompts"]:
        torch.manual_seed(3)
        results.append(generate(model, job, [row], do_sample=True, top_k=0, temperature=1.0))
    return results


def off(model, job):
    """The base, by each of the three ways to have it."""
    with model.steering.off():
        results = [generate(model, job, job["prompts"])]
    strength, model.steering.strength = model.steering.strength, 0.0
    results.append(generate(model, job, job["prompts"]))
    model.steering.strength, model.steering.enabled = strength, False
    results.append(generate(model, job, job["prompts"]))
    model.steering.enabled = True
    return results


def decoder(model, job):
    """Hidden states of AutoModel, through the LM head of the whole model: the last prompt token's logits."""
    body = transformers.AutoModel.from_pretrained(job["folder"], **TRUST).eval()
    with torch.no_grad():
        found = [body(torch.tensor([row])).last_hidden_state[0, -1] for row in job["prompts"]]
        return [model.get_output_embeddings()(hidden).tolist() for hidden in found]


def tokenizer(model, job):
    found = transformers.AutoTokenizer.from_pretrained(job["folder"])
    messages = [{"role": "user", "content": "hi"}]
    return [
        found.apply_chat_template(messages, add_generation_prompt=True, tokenize=False),
        model.generation_config.max_new_tokens,
        type(transformers.AutoConfig.from_pretrained(job["folder"], trust_remote_code=True)).model_type,
    ]


def untrusted(model, job):
    """The error of every way to open the repository without trust_remote_code."""
    found = []
    for auto in (transformers.AutoConfig, transformers.AutoModel, transformers.AutoModelForCausalLM):
        for how in ({}, {"trust_remote_code": False}):
            try:
                found.append(f"opened {type(auto.from_pretrained(job['folder'], **how)).__name__}")
            except Exception as error:  # noqa: BLE001, PERF203 - whatever it is, it is reported
                found.append(f"{type(error).__name__}: {error}")
    return found


def again(model, job):
    """save_pretrained, and what opening that gives."""
    folder = f"{job['folder']}-again"
    model.save_pretrained(folder)
    return generate(open_model(folder)[0], job, job["prompts"])


def pickled(model, job):
    """A model that was pickled, as to send it to another process."""
    return generate(pickle.loads(pickle.dumps(model)), job, job["prompts"])  # noqa: S301


def half(model, job):
    """Types of the steering's own tensors, and of all others, when the repository is opened in bfloat16."""
    found = transformers.AutoModelForCausalLM.from_pretrained(
        job["folder"], trust_remote_code=True, dtype=torch.bfloat16
    )
    own = {name: str(t.dtype) for name, t in found.state_dict().items() if "steering" in name}
    generate(found, job, job["prompts"])
    return [own, sorted({str(t.dtype) for name, t in found.state_dict().items() if "steering" not in name})]


def auto(model, job):
    """The type that a user gets who leaves it to the repository, and that of a forward pass."""
    found = transformers.AutoModelForCausalLM.from_pretrained(job["folder"], dtype="auto")
    with torch.no_grad():
        logits = found(torch.tensor([job["prompts"][0]])).logits
    return [str(found.dtype), *sorted({str(t.dtype) for t in found.parameters()}), str(logits.dtype)]


def adapter(model, job):
    """With the adapter that lies in the repository, and with it switched off."""
    from peft import PeftModel

    found = PeftModel.from_pretrained(
        open_model(job["folder"], trust=False)[0], f"{job['folder']}/steering-lora"
    ).eval()
    on = generate(found, job, job["prompts"])
    with found.disable_adapter():
        return [on, generate(found, job, job["prompts"])]


MODES = {
    "greedy": lambda model, job: generate(model, job, job["prompts"]),
    "uncached": lambda model, job: generate(model, job, job["prompts"], use_cache=False),
    "single": lambda model, job: [generate(model, job, [row]) for row in job["prompts"]],
    "sampled": sampled,
    "off": off,
    "decoder": decoder,
    "tokenizer": tokenizer,
    "untrusted": untrusted,
    "again": again,
    "pickled": pickled,
    "half": half,
    "auto": auto,
    "adapter": adapter,
}


def open_model(folder, trust=True):
    how = TRUST if trust else {"dtype": torch.float32}
    model, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **how)
    return model.eval(), {key: sorted(map(str, names)) for key, names in report.items() if names}


def main():
    results = []
    for job in json.load(sys.stdin):
        model, report = open_model(job["folder"], job.get("trust", True))
        results.append({"report": report, **{mode: MODES[mode](model, job) for mode in job["modes"]}})
    try:
        import adaras_export  # noqa: F401
    except ImportError:
        # A line of its own: asking for trust prints a question.
        print("\n" + json.dumps({"transformers": transformers.__version__, "results": results}))


if __name__ == "__main__":
    main()
