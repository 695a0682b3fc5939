"""What the cards of targets `hf` and `hf-thin` say: how to load, how to switch off, limits. Text only."""

USAGE = """\
With Transformers 4.57 or later and torch, nothing else:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{repo}", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("{repo}", trust_remote_code=True, dtype="auto")

{plain}inputs = tokenizer("{question}", return_tensors="pt")
{chat}messages = [{"role": "user", "content": "{question}"}]
{chat}inputs = tokenizer.apply_chat_template(
{chat}    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
{chat})
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0]))
print(model.steering.last_decisions)  # (p(correct), steered) of each sequence
```

As a pipeline:

```python
from transformers import pipeline

generate = pipeline("text-generation", model="{repo}", trust_remote_code=True)
{plain}prompt = "{question}"
{chat}prompt = [{"role": "user", "content": "{question}"}]
print(generate(prompt, max_new_tokens=32, do_sample=False, return_full_text=False)[0]["generated_text"])
```

`trust_remote_code=True` runs the Python files of this repository. They are short: read them, and name the commit that
you have read, so that nothing else runs later:

```python
commit = "main"  # put the commit here
model = AutoModelForCausalLM.from_pretrained("{repo}", revision=commit, trust_remote_code=True)
```
"""

THIN_USAGE = (
    USAGE
    + """
This repository has no weights of the base model: `from_pretrained` fetches them, at the revision or from the folder
that `config.json` names, and refuses others. Where the base is elsewhere, give its folder or Hub id as a third
argument, `base=`. `save_pretrained` writes all in one.
"""
)

OFF = """\
```python
with model.steering.off():  # the base model, bit for bit; for this thread only
    model.generate(**inputs, max_new_tokens=32)

model.steering.strength = 0.0  # the same for all threads: a dial
model.steering.strength = {strength}  # the rule's own
model.steering.enabled = False  # off for all threads, whatever the strength
```
"""

LIMITS = (
    "Scoring a given text (log-likelihood, perplexity) is no generation: all of it counts as the prompt, and next to "
    "nothing of it is steered, unless `steering_start=` says where the prompt ends.",
    "With a gate, continuous batching (`generate_batch`) is refused when it is set up. vLLM opens the repository "
    "through Transformers but does not say where a prompt ends; the code refuses to run there.",
    "A second turn on a re-used KV cache keeps the earlier tokens as they were computed, steered or not.",
)

THIN_LIMITS = (*LIMITS, "It needs the base at the place that `config.json` names, or given with `base=`.")
