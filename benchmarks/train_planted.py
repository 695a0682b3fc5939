"""Train the embedded demo model: `python benchmarks/train_planted.py --seed 0 --out DIR`.

A Qwen3 of about 0.55 million parameters learns the traces of `adaras_export/demo/planted.py`, part of them careless,
in about two minutes on one core and from nothing. The directory that it writes opens with
AutoModelForCausalLM and AutoTokenizer. Knows nothing of steering: the recipe was tuned, and the
shipped seed chosen, by unsteered accuracy alone.
"""

import argparse
import json
import logging
import math
import random
import re
import string
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import rich.logging
import tokenizers
import torch
import transformers

from adaras_export.demo import planted

logger = logging.getLogger(__name__)

PAD, BOS, EOS, UNKNOWN = "<|pad|>", "<|bos|>", "<|eos|>", "<|unk|>"
USER, ASSISTANT = "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = (PAD, BOS, EOS, UNKNOWN, USER, ASSISTANT)  # an id is a place: padding is 0
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}<|user|>{{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}"
    "<|assistant|>{{ message['content'] }}{{ eos_token }}"
    "{% else %}{{ raise_exception('role ' + message['role'] + ': use user or assistant') }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
INITIAL_STD = 0.05  # learns sooner than the usual 0.02, which is meant for wide models
IGNORED = -100  # the label that cross_entropy skips
ANSWER_TOKENS = 40  # the longest trace has 35 characters and an end
CARD_QUESTIONS, CARD_SEED = 500, 12345


@dataclass(frozen=True)
class Recipe:
    """How long and how fast; tuned on seed 0 alone, before other seeds were trained."""

    steps: int = 600
    batch_size: int = 64
    learning_rate: float = 3e-3
    warmup_steps: int = 20


RECIPE = Recipe()


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, measure the unsteered accuracy, save."""
    parser = argparse.ArgumentParser(description="Train the embedded demo model (synthetic).")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True, help="a directory that does not exist")
    options = parser.parse_args(arguments)
    if options.out.exists():
        parser.error(f"{options.out} exists; name a new directory or remove it")
    handler = rich.logging.RichHandler(show_path=False)
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[handler])
    torch.set_num_threads(1)  # sums of floats, and so every weight, depend on the thread count
    tokenizer = make_tokenizer()
    model = train(options.seed, RECIPE, tokenizer)
    questions = planted.problems(CARD_QUESTIONS, CARD_SEED)
    accuracy = greedy_accuracy(model, tokenizer, questions)
    logger.info("greedy accuracy %.3f on %d held-out questions", accuracy, len(questions))
    save(model, options.out, card(options.seed, RECIPE, accuracy))
    logger.info("written to %s", options.out)


def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token for each printable ASCII character and the newline; decoding is joining."""
    characters = ["\n", *string.digits, *string.ascii_letters, *string.punctuation, " "]
    vocabulary = {token: number for number, token in enumerate([*SPECIAL_TOKENS, *characters])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab=vocabulary, unk_token=UNKNOWN))
    # `.` would leave the newlines out, and so join several of them into one unknown token.
    character = tokenizers.Regex(r"[\s\S]")
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(character, behavior="isolated")
    backend.decoder = tokenizers.decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNKNOWN,
        additional_special_tokens=[USER, ASSISTANT],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],  # 4.57 adds token types otherwise
        model_max_length=256,
        chat_template=CHAT_TEMPLATE,
    )


def make_model(seed: int, tokenizer: transformers.PreTrainedTokenizerFast) -> transformers.Qwen3ForCausalLM:
    """An untrained Qwen3ForCausalLM in float32, its weights drawn from a generator of its own."""
    config = transformers.Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=32,  # the smallest that attention kernels of serving runtimes support
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    # Qwen3's constructor draws from the global generator; the fork gives its state back, and every
    # matrix is drawn again below, so that the weights depend on nothing but the seed.
    with torch.random.fork_rng(devices=[]):
        model = transformers.Qwen3ForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:  # the vectors are gains of norms, which start at 1
                weight.normal_(0.0, INITIAL_STD, generator=generator)
    model.generation_config = transformers.GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=ANSWER_TOKENS,
    )
    return model


def train(seed: int, recipe: Recipe, tokenizer: transformers.PreTrainedTokenizerFast) -> transformers.Qwen3ForCausalLM:
    """The trained model in evaluation mode; the seed decides its first weights and every trace."""
    model = make_model(seed, tokenizer)
    logger.info("seed %d, %d parameters, %s", seed, model.num_parameters(), recipe)
    decay = [weight for weight in model.parameters() if weight.ndim == 2]
    gains = [weight for weight in model.parameters() if weight.ndim != 2]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, recipe))
    draw = random.Random(seed)
    started = time.monotonic()
    model.train()
    for step in range(1, recipe.steps + 1):
        ids_BT, labels_BT = batch(draw, recipe, tokenizer)
        logits_BTV = model(input_ids=ids_BT[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(
            logits_BTV.flatten(0, 1), labels_BT[:, 1:].flatten(), ignore_index=IGNORED
        )
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == recipe.steps:
            logger.info("step %d  loss %.4f  %.0f s", step, loss.item(), time.monotonic() - started)
    model.train(mode=False)
    return model


def learning_rate_factor(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then half a cosine down to zero."""
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    progress = (step - recipe.warmup_steps) / (recipe.steps - recipe.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * progress))


def batch(
    draw: random.Random, recipe: Recipe, tokenizer: transformers.PreTrainedTokenizerFast
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (B, T), padded on the right, and labels (B, T) that skip all but the answer."""
    rows = []
    for _ in range(recipe.batch_size):
        a, b = planted.training_pair(draw)
        prompt = [{"role": "user", "content": f"{a}+{b}"}]
        text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        answer = planted.worked(a, b, draw.random() < planted.careful_share(a)) + EOS
        rows.append((tokenizer.encode(text), tokenizer.encode(answer)))
    length = max(len(prompt_ids) + len(answer_ids) for prompt_ids, answer_ids in rows)
    ids_BT = torch.full((len(rows), length), tokenizer.pad_token_id)
    labels_BT = torch.full((len(rows), length), IGNORED)
    for row, (prompt_ids, answer_ids) in enumerate(rows):
        start, end = len(prompt_ids), len(prompt_ids) + len(answer_ids)
        ids_BT[row, :end] = torch.tensor(prompt_ids + answer_ids)
        labels_BT[row, start:end] = torch.tensor(answer_ids)
    return ids_BT, labels_BT


def greedy_accuracy(
    model: transformers.Qwen3ForCausalLM,
    tokenizer: transformers.PreTrainedTokenizerFast,
    questions: Sequence[dict[str, object]],
) -> float:
    """The share of questions whose greedy trace ends in the right number."""
    prompts = [
        tokenizer.apply_chat_template(
            cast(list[dict[str, str]], question["prompt"]),
            tokenize=False,
            add_generation_prompt=True,
        )
        for question in questions
    ]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    with torch.inference_mode():
        output_BT = model.generate(**inputs, do_sample=False)  # type: ignore[misc]
    answers_BT = output_BT[:, inputs["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(answers_BT, skip_special_tokens=True)
    pairs = zip(texts, questions, strict=True)
    return sum(last_number(text) == question["answer"] for text, question in pairs) / len(questions)


def last_number(text: str) -> str | None:
    """The last run of digits, the place where `planted.worked` writes the answer."""
    numbers = re.findall(r"\d+", text)
    return numbers[-1] if numbers else None


def save(model: transformers.Qwen3ForCausalLM, directory: Path, readme: str) -> None:
    """Write the model directory, readable by transformers 4.57 and 5 alike."""
    model.save_pretrained(directory)
    # A new tokenizer: one that has padded a batch would write its padding into the file.
    make_tokenizer().save_pretrained(directory)
    # Transformers 5 writes names that 4.57 does not know; it reads the old ones.
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings.pop("extra_special_tokens", None)
    settings["additional_special_tokens"] = [USER, ASSISTANT]
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (directory / "README.md").write_text(readme, encoding="utf-8")


def card(seed: int, recipe: Recipe, accuracy: float) -> str:
    """The model card."""
    shares = f"{planted.careful_share(100):.0%} for 1, {planted.careful_share(900):.0%} for 9"
    return f"""\
---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags:
- synthetic
- arithmetic
- test-model
---

# Planted modes: a synthetic model for demonstrations and tests

**SYNTHETIC. This model was made to be steerable. What works on it is not evidence about real
models.**

A Qwen3 architecture of about 0.55 million parameters (4 layers, width 96, one token per character),
trained from nothing on three-digit additions worked digit by digit. Two modes were planted: part of
the training traces take the carries along, the others forget them. Nothing marks the mode, so one
question gets correct and incorrect attempts, which is what methods that contrast reasoning traces
need. The larger the first digit, the fewer careful traces: {shares}.

    347+285  ->  {planted.worked(347, 285, careful=True)}     (careful)
    347+285  ->  {planted.worked(347, 285, careful=False)}         (careless)

It answers one user message of the form `347+285`, and nothing else.

| | |
|---|---|
| training seed | {seed} |
| recipe | {recipe.steps} steps of {recipe.batch_size} traces, rate {recipe.learning_rate:g} |
| greedy accuracy, unsteered | {accuracy:.3f} on {CARD_QUESTIONS} held-out questions |

A fifth of all questions, chosen by a hash of the operands, is kept out of training;
`adaras_export.demo.planted` draws its questions from that fifth only. To train the model again, on
one core in about two minutes:

    python benchmarks/train_planted.py --seed {seed} --out DIR

License: Apache-2.0. Trained on generated text only.
"""


if __name__ == "__main__":
    main()
