"""What the cards of target `onnx` say: how to load, how to switch off, limits. Text only."""

USAGE = """\
Download the repository first; the programs below are run beside the folder `steered`:

```bash
hf download {repo} --local-dir steered
```

{plain}With [ONNX Runtime](https://onnxruntime.ai) and tokenizers, nothing else:
{chat}With [ONNX Runtime](https://onnxruntime.ai), and Transformers for the chat template, without torch:

```python
import json
from pathlib import Path

import numpy as np
import onnxruntime
{plain}from tokenizers import Tokenizer
{chat}from transformers import AutoTokenizer

session = onnxruntime.InferenceSession("steered/onnx/model.onnx")
{plain}tokenizer = Tokenizer.from_file("steered/tokenizer.json")
{chat}tokenizer = AutoTokenizer.from_pretrained("steered")
ends = np.atleast_1d(json.loads(Path("steered/genai_config.json").read_text())["model"]["eos_token_id"])
inputs = {one.name: one for one in session.get_inputs()}
outputs = [one.name for one in session.get_outputs()]
kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16}

cache = {
    name: np.zeros((1, one.shape[1], 0, one.shape[3]), kinds[one.type])
    for name, one in inputs.items()
    if name.startswith("past_key_values.")
}
{plain}ids, answer = tokenizer.encode("{question}").ids, []
{chat}messages = [{"role": "user", "content": "{question}"}]
{chat}ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
{chat}answer = []
while len(answer) < 32:
    seen = next(iter(cache.values())).shape[2]
    feeds = {
        "input_ids": np.array([ids]),
        "attention_mask": np.ones((1, seen + len(ids)), np.int64),
        "position_ids": np.arange(seen, seen + len(ids))[None],
        **cache,
    }
    found = dict(zip(outputs, session.run(None, {name: value for name, value in feeds.items() if name in inputs})))
    cache = {name.replace("present", "past_key_values"): found[name] for name in outputs if name != "logits"}
    ids = [int(found["logits"][0, -1].argmax())]
    if ids[0] in ends:
        break
    answer += ids
print(tokenizer.decode(answer))
```

With [ONNX Runtime GenAI](https://onnxruntime.ai/docs/genai/):

```python
{chat}import json
{chat}
import onnxruntime_genai as og

model = og.Model("steered")
tokenizer, parameters = og.Tokenizer(model), og.GeneratorParams(model)
parameters.set_search_options(max_length=64)
generator = og.Generator(model, parameters)
{plain}prompt = "{question}"
{chat}messages = [{"role": "user", "content": "{question}"}]
{chat}prompt = tokenizer.apply_chat_template(json.dumps(messages), add_generation_prompt=True)
generator.append_tokens(tokenizer.encode(prompt))
while not generator.is_done():
    generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0)))
```

With [Transformers.js](https://huggingface.co/docs/transformers.js), in Node or a browser, from the Hub:

```js
import { pipeline } from "@huggingface/transformers";

{plain}const generate = await pipeline("text-generation", "{repo}");
{chat}const name = "{repo}";
{chat}const generate = await pipeline("text-generation", name);
{chat}if (!generate.tokenizer.chat_template) { // Transformers.js looks for it in tokenizer_config.json only
{chat}  const file = await fetch(`https://huggingface.co/${name}/resolve/main/chat_template.jinja`);
{chat}  generate.tokenizer.chat_template = await file.text();
{chat}}
{plain}console.log(await generate("{question}", { max_new_tokens: 64 }));
{chat}const [answer] = await generate([{ role: "user", content: "{question}" }], { max_new_tokens: 64 });
{chat}console.log(answer.generated_text.at(-1).content);
```

With the runner of the library adaras-export, which tells what the gate decided (how to install it is said under Verify
it):

```bash
{plain}python -m adaras_export.exporters.onnx steered {question} --raw
{chat}python -m adaras_export.exporters.onnx steered {question}
```
"""

PAGE_USAGE = """
In a browser: the page answers a prompt with and without steering; nothing leaves it.

```bash
python -m http.server --directory steered  # and open the address that it prints
```
"""

OFF = """\
With ONNX Runtime alone, a number that may be fed with each call:

```python
feeds["steering_strength"] = np.array(0.0, np.float32)  # the base model; {strength} is the rule's own
session.run(None, feeds)
```

With the runner: `--strength 0`. GenAI and Transformers.js cannot feed it; there, use the base model.
"""

LIMITS = (
    "OpenVINO rejects functions in a graph: it takes an export with `--inline` only.",
    "A call with several tokens is a prompt, and one token a generated one: scoring a given text steers next to "
    "nothing.",
    "The layer of the KV cache that `config.json` counts beyond the base's carries the gate's decision. A runtime that "
    "drops it decides anew.",
)
ROUNDED = (
    "The weights are rounded. An evaluation of the rule, where one is told under Effect, was made with the base's own; "
    "so was the gate's threshold, unless it was calibrated on these."
)
