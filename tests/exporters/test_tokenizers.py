"""The tokenizer that opens with a repository is the one that opens with its base, whatever class that one names.

No weights: which class AutoTokenizer takes depends on config.json and tokenizer_config.json, by other rules in each
generation of Transformers.
"""

import json

import pytest
import tiny
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from adaras_export.core.base_model import BaseModel
from adaras_export.core.checkpoint import Checkpoint
from adaras_export.core.families import FAMILIES
from adaras_export.exporters.hf.exporter import payload, repository_checks, steered_config, write_repository

TEXTS = (
    "What is 1234 + 56?",
    "  two  spaces\n\n\tand a tab ",
    "Naïve façade, 東京, e\u0301 and emoji 🙂",
    "<bos>user<eos> hi<|x|>it's WE'LL",
    "",
)
WORDS = [*TEXTS, "the quick brown fox, and 12 times 7 is 84", "don't they'll user hi"] * 3
SPECIAL = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
CHAT = [{"role": "user", "content": "785+963"}]


def byte_level(first):
    """Pieces of bytes; of digits, three at once: other pieces than those of Qwen2's or GPT-2's expression."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}{1,3}| ?\p{L}+|\s+|[^\s\p{L}\p{N}]+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return _finished(core, alphabet, first)


def metaspace(first):
    """Pieces of words behind a mark for spaces, bytes for letters that are none."""
    core = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return _finished(core, [f"<0x{n:02X}>" for n in range(256)], first)


def _finished(core, alphabet, first):
    tokens = [*SPECIAL.values(), *(letter for letter in alphabet if len(letter) > 1)]
    letters = [letter for letter in alphabet if len(letter) == 1]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=tokens, initial_alphabet=letters, show_progress=False)
    core.train_from_iterator(WORDS, trainer)
    made = json.loads(core.to_str())
    made["added_tokens"] = [one for one in made["added_tokens"] if one["content"] in SPECIAL.values()]
    core = Tokenizer.from_str(json.dumps(made))
    core.add_tokens([AddedToken("<|x|>", normalized=False)])
    if first:
        core.post_processor = processors.TemplateProcessing(
            single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", core.token_to_id("<bos>"))]
        )
    return core


KINDS = {"bytes": byte_level, "metaspace": metaspace}
GENERIC = "PreTrainedTokenizerFast"


def write_base(folder, family, kind, settings, first):
    folder.mkdir()
    sizes = {key: value for key, value in {**tiny._SIZES, **tiny.SPECS[family][1]}.items() if value is not ...}
    transformers.AutoConfig.for_model(family, **sizes).save_pretrained(folder)
    KINDS[kind](first).save(str(folder / "tokenizer.json"))
    settings = {**SPECIAL, "chat_template": tiny.TEMPLATE, "model_max_length": 77, **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def exported(base, family, out):
    rule = tiny.make_rule(BaseModel("base", family, tiny.LAYERS, tiny.MLP_SIZE, tiny.HIDDEN_SIZE))
    out.mkdir()
    write_repository(
        out, Checkpoint(base), steered_config(json.loads((base / "config.json").read_text()), rule), payload()
    )
    return out


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def opened(folder, **how):
    """All that a user sees of a tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(folder, **how)
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    return {
        "class": type(tokenizer).__name__,
        "ids": ids,
        "texts": [tokenizer.decode(one) for one in ids],
        "special": {k: str(v) for k, v in tokenizer.special_tokens_map.items()},
        "chat": tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True),
        "rest": [len(tokenizer), tokenizer.model_max_length, tokenizer.padding_side, tokenizer.model_input_names],
    }


def named(name):
    return {} if name is None else {"tokenizer_class": name}


# A class that is none of the family's, as DeepSeek-R1-Distill-Qwen has it, and what such a repository asks for.
WHOSE = {"own": "bytes", "general": "bytes", "foreign": "metaspace", "none": "bytes"}
FOREIGN = {family: "GPT2Tokenizer" if family == "llama" else "LlamaTokenizerFast" for family in FAMILIES}


# Those that read images have the tokenizer of their decoder's family.
OWN = [name for name in FAMILIES if name in {family for family, _ in tiny.SPECS.values()}]
RUNNING = [name for name in OWN if FAMILIES[name].since <= int(transformers.__version__.partition(".")[0])]
CASES = [(name, whose, kind) for name in RUNNING for whose, kind in WHOSE.items()]


@pytest.mark.parametrize(("family", "whose", "kind"), [*CASES, ("qwen2", "foreign", "bytes")])
def test_the_tokenizer_of_the_base_opens_whatever_class_it_names(family, whose, kind, tmp_path):
    unnamed_in_4 = whose == "none" and transformers.__version__ < "5"
    if unnamed_in_4 and family in ("granite", "hunyuan_v1_dense", "seed_oss"):
        pytest.skip("Transformers 4 opens no such base")
    if unnamed_in_4 and family == "exaone4":
        pytest.skip("the class that Transformers 4 takes tokenises differently in 5; the family's own bases name it")
    name = {"own": FAMILIES[family].tokenizer, "general": GENERIC, "foreign": FOREIGN[family], "none": None}[whose]
    settings = named(name) | ({"add_bos_token": True} if whose == "foreign" else {})
    base = write_base(tmp_path / "base", family, kind, settings, first=whose == "own")
    out = exported(base, family, tmp_path / "out")
    ours, theirs = opened(out, trust_remote_code=True), opened(base)
    if unnamed_in_4 and family == "phi":
        del ours["class"], theirs["class"]  # version 5 opens another one, which does the same
    assert ours == theirs


@pytest.mark.parametrize(
    ("settings", "config", "expected"),
    [
        ({"tokenizer_class": "LlamaTokenizerFast"}, {}, "LlamaTokenizerFast"),
        ({}, {"tokenizer_class": "GPT2Tokenizer"}, "GPT2Tokenizer"),
        ({}, {}, "Qwen2Tokenizer"),
    ],
)
def test_either_generation_of_transformers_writes_the_same_class(settings, config, expected, tmp_path):
    base = write_base(tmp_path / "base", "qwen2", "bytes", settings, first=False)
    edit_json(base / "config.json", **config)
    out = exported(base, "qwen2", tmp_path / "out")
    before, after = ((folder / "tokenizer_config.json").read_text() for folder in (base, out))
    assert json.loads(after) == json.loads(before) | {"tokenizer_class": expected}
    assert settings == {} or after == before
    # With the other class, version 4 opens another tokenizer, and version 5 the same.
    edit_json(out / "tokenizer_config.json", tokenizer_class="GPTNeoXTokenizer")
    checks = repository_checks(out, Checkpoint(base), json.loads((out / "config.json").read_text()), payload())
    assert [check.detail for check in checks if not check.ok] == ["tokenizer_config.json"]


def test_a_repository_without_code_names_what_opens_the_tokenizer_of_the_base(tmp_path):
    """Stock forms have another model_type, by which Transformers 5 would take a class that splits words otherwise."""
    base = write_base(tmp_path / "base", "qwen2", "bytes", {"tokenizer_class": "LlamaTokenizerFast"}, first=False)
    config = json.loads((base / "config.json").read_text()) | {"model_type": "llama"}
    (tmp_path / "out").mkdir()
    write_repository(tmp_path / "out", Checkpoint(base), config, {})
    theirs, ours = opened(base), opened(tmp_path / "out")
    assert [theirs[key] for key in ("ids", "special", "chat")] == [ours[key] for key in ("ids", "special", "chat")]
    assert all(check.ok for check in repository_checks(tmp_path / "out", Checkpoint(base), config, {}))


@pytest.mark.skipif(transformers.__version__ < "5", reason="Transformers 4 opens the class that is written")
def test_a_class_that_no_name_stands_for_is_refused_with_what_to_do(tmp_path):
    base = write_base(tmp_path / "base", "llama", "metaspace", {}, first=False)
    out = exported(base, "llama", tmp_path / "out")
    checks = repository_checks(out, Checkpoint(base), json.loads((out / "config.json").read_text()), payload())
    (failed,) = [check for check in checks if not check.ok]
    assert failed.detail == "the base's tokenizer_config.json has no tokenizer_class; name the one that is meant"
