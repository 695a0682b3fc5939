"""What the cards of target `peft` say: how to load, how to switch off, limits. Text only."""

_OPENING = """\
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

place = PeftConfig.from_pretrained("{repo}")  # names the base model and its commit
name, commit = place.base_model_name_or_path, place.revision or "main"
tokenizer = AutoTokenizer.from_pretrained(name, revision=commit)
base = AutoModelForCausalLM.from_pretrained(name, revision=commit, dtype="auto")
model = PeftModel.from_pretrained(base, "{repo}").eval()

{plain}inputs = tokenizer("{question}", return_tensors="pt")
{chat}messages = [{"role": "user", "content": "{question}"}]
{chat}inputs = tokenizer.apply_chat_template(
{chat}    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
{chat})
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0]))
"""

_TRANSFORMERS = """
Without PeftModel, by Transformers itself, which takes the adapter's numbers in the type of the base:

```python
model = AutoModelForCausalLM.from_pretrained(name, revision=commit, dtype="auto")
model.load_adapter("{repo}")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0]))
```
"""

USAGE = (
    f"With PEFT 0.18 or later, no code of anybody else:\n\n```python\n{_OPENING}```\n"
    + _TRANSFORMERS
    + """
PEFT says at loading that an adapter with `lora_bias` cannot be merged into layers without a bias; that is so, and no
fault of the adapter. Two such adapters add up: `model.load_adapter(folder, "other")`, then
`model.base_model.set_adapter(["default", "other"])`.
"""
)

OFF = """\
With the PeftModel: off, row by row, and dialled.

```python
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(name, revision=commit, dtype="auto"), "{repo}")
with model.disable_adapter():  # the base model, bit for bit
    model.generate(**inputs, max_new_tokens=32)

prompts = {name: value.repeat(2, 1) for name, value in inputs.items()}
names = ["default", "__base__"]  # the first row is steered, the second is not
model.generate(**prompts, adapter_names=names, max_new_tokens=32)

for module in model.modules():  # half of the strength; 1 is what was exported, 0 is off
    if hasattr(module, "set_scale"):
        module.set_scale("default", 0.5)
```
"""

LIMITS = (
    "vLLM refuses adapters with `lora_bias`, by name. There, an export to target `stock` serves.",
    "It cannot be merged into a base whose down projections have no bias.",
)

ADAPTIVE_USAGE = (
    """\
**This adapter, unlike a stock one, needs the library adaras-export** (how to install it is said under Verify it). The
import below registers its method with PEFT; without it, PEFT and Transformers refuse the adapter with
`KeyError: 'ADARAS'`.

```python
import adaras_export.exporters.peft.method
"""
    + _OPENING
    + """\
print(model.steering.last_decisions)  # (p(correct), steered) of each sequence
```
"""
    + _TRANSFORMERS
    + """
Several such adapters may be loaded and switched with `set_adapter`. Works with PEFT 0.18 to 0.21.
"""
)

ADAPTIVE_OFF = """\
With the PeftModel: off, dialled, and row by row.

```python
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(name, revision=commit, dtype="auto"), "{repo}")
with model.disable_adapter():  # the base model, bit for bit
    model.generate(**inputs, max_new_tokens=32)

model.steering.strength *= 0.5  # 0 is the base model

prompts = {name: value.repeat(2, 1) for name, value in inputs.items()}
names = ["default", "__base__"]  # the gate decides on the first row, the second is not steered
model.generate(**prompts, adapter_names=names, max_new_tokens=32)
```
"""

ADAPTIVE_LIMITS = (
    "It opens only where adaras-export is installed. For others, an export to target `hf` carries the whole rule, too.",
    "Several such adapters do not add up, and none can be merged.",
)
