"""Open an exported folder in a process without this library, generate, and print the results as JSON.

Run as a file: python clean_process.py FOLDER PROMPTS_JSON MAX_NEW_TOKENS
"""

import json
import sys
from typing import Any


def main(folder: str, prompts: list[Any], max_new_tokens: int) -> None:
    """Answer each prompt, text or chat, with steering on and off."""
    sys.modules["adaras_export"] = None  # type: ignore[assignment]  # from here on, importing it fails
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    answers = []
    for prompt in prompts:
        text = (
            prompt
            if isinstance(prompt, str)
            else tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        )
        inputs = tokenizer(text, return_tensors="pt", add_special_tokens=isinstance(prompt, str))
        answer = {"prompt": text}
        for name in ("steered", "off"):
            model.steering.enabled = name == "steered"
            ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
            answer[name] = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            if name == "steered":
                answer["decision"] = model.steering.last_decisions
        answers.append(answer)
    sys.stdout.write(json.dumps(answers))


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]))
