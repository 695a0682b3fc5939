"""What the cards of target `stock`, and of `peft` with merge, say: how to load and switch off, limits. Text only."""

from adaras_export.exporters.stock.constant_neuron import NEURONS

WEIGHTS = (
    "The steering is a bias behind the MLPs, in a file of its own, together with the zero biases that the architecture "
    "wants besides. Where the base has such biases, they are changed; nothing else of it is."
)
SWITCHABLE_WEIGHTS = (
    "The checkpoint computes what the base does. All its weights are here, but the matrices of each MLP have "
    f"{NEURONS} more neurons, with zero weights, one of them with a constant activation. The LoRA in `steering-lora` "
    "turns the steering on."
)

USAGE = """\
With Transformers, no custom code:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{repo}")
model = AutoModelForCausalLM.from_pretrained("{repo}", dtype="auto")

{plain}inputs = tokenizer("{question}", return_tensors="pt")
{chat}messages = [{"role": "user", "content": "{question}"}]
{chat}inputs = tokenizer.apply_chat_template(
{chat}    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
{chat})
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0]))
```

As a pipeline:

```python
from transformers import pipeline

generate = pipeline("text-generation", model="{repo}")
{plain}prompt = "{question}"
{chat}prompt = [{"role": "user", "content": "{question}"}]
print(generate(prompt, max_new_tokens=32, do_sample=False, return_full_text=False)[0]["generated_text"])
```

An ordinary checkpoint, which servers open as well. vLLM (where `config.json` says `hy_v3`, with
`--model-impl transformers` besides):

```bash
vllm serve {repo}
```
"""

OFF = """\
Not here: it is always on, from the first token of the prompt, for every prompt, at one strength. Without steering, load
the base model.
"""

_SERVERS = (
    "A server whose MLP has no bias for this architecture **drops the biases without a word**, and with them the "
    "steering: SGLang does (by its source, 0.5.23) unless it is started with `--model-impl transformers`, and TGI. "
    "Compare a greedy answer with that of Transformers before you rely on one.",
    "Where `config.json` says `hy_v3` (a Qwen3, written as the architecture that has its norms and an MLP bias), it "
    "needs Transformers 5.19 or later, and vLLM `--model-impl transformers`.",
)

LIMITS = _SERVERS

SWITCHABLE_USAGE = """\
In a server, steering is on for the requests that name the adapter as their model, `steered` here, and off for others.
vLLM (where `config.json` says `hy_v3`, with `--model-impl transformers` besides):

```bash
hf download {repo} --local-dir model
vllm serve model --served-model-name base --enable-lora --max-lora-rank 8 --max-loras 2 \\
    --lora-modules steered=model/steering-lora
```

In Python, in the folder into which that was downloaded, with Transformers and PEFT:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("model")
model = AutoModelForCausalLM.from_pretrained("model", dtype="auto")  # the base, as it was
model = PeftModel.from_pretrained(model, "model/steering-lora")  # steered

{plain}inputs = tokenizer("{question}", return_tensors="pt")
{chat}messages = [{"role": "user", "content": "{question}"}]
{chat}inputs = tokenizer.apply_chat_template(
{chat}    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
{chat})
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0]))
```

The same with vLLM's engine, request by request:

```python vllm
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

if __name__ == "__main__":  # vLLM starts processes, which read this file again
    engine = LLM("model", enable_lora=True, max_lora_rank=8, max_loras=2)
    greedy, steered = SamplingParams(temperature=0, max_tokens=32), LoRARequest("steered", 1, "model/steering-lora")
    for request in (None, steered):  # the base model, then steered
{plain}        [answer] = engine.generate(["{question}"], greedy, lora_request=request)
{chat}        messages = [{"role": "user", "content": "{question}"}]
{chat}        [answer] = engine.chat(messages, greedy, lora_request=request)
        print(answer.outputs[0].text)
```
"""

SWITCHABLE_OFF = """\
In a server, name `base` as the model of a request. In Python:

```python
with model.disable_adapter():
    model.generate(**inputs, max_new_tokens=32)
```

The checkpoint alone, without the adapter, is the base model up to rounding.
"""

SWITCHABLE_LIMITS = (
    *_SERVERS,
    "Keep a slot of `--max-loras` empty: vLLM's kernels for the CPU (0.32) give requests without a LoRA what is in the "
    "last.",
    f"Adapters that were trained for the base's MLPs do not fit these, which are {NEURONS} neurons wider.",
)
