"""Driver of optimum-onnx: ORTModelForCausalLM and Transformers' generate()."""

from functools import partial

import torch
import transformers
from greedy import decisions, each, padded, serve
from optimum.onnxruntime import ORTModelForCausalLM

torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()


def run(job, rows):
    model = ORTModelForCausalLM.from_pretrained(job["folder"], subfolder="onnx", file_name="model.onnx")
    model.embed_size_per_head = job.get("head_size", model.embed_size_per_head)  # it ignores head_dim of many families
    ids, mask = (torch.tensor(part) for part in padded(rows, job["pad"]))
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=job["steps"],
        do_sample=False,
        pad_token_id=job["pad"],
        return_dict_in_generate=True,
        output_logits=True,
    )
    cache = out.past_key_values
    state = cache[job["state"]] if job["state"] is not None else ()
    found = {f"present.{job['state']}.{slot}": value for slot, value in zip(("key", "value"), state, strict=False)}
    return {
        "sequences": out.sequences[:, ids.shape[1] :].tolist(),
        "logits": torch.stack(out.logits).tolist(),
        "decisions": decisions(job["state"], found) if found else [],
    }


if __name__ == "__main__":
    serve({"batch": lambda job: run(job, job["rows"]), "single": partial(each, run)})
