"""The task, the held-out rule, the training script and the model that ships."""

import random
import re
import sys
from importlib.util import module_from_spec, spec_from_file_location

import pytest
import torch
import transformers
from places import PLANTED, ROOT

from adaras_export.demo import planted

_SPEC = spec_from_file_location("train_planted", ROOT / "benchmarks" / "train_planted.py")
train_planted = sys.modules[_SPEC.name] = module_from_spec(_SPEC)
_SPEC.loader.exec_module(train_planted)

MODEL = PLANTED
SHORT = train_planted.Recipe(steps=4, batch_size=4, warmup_steps=2)


def operands(problem):
    a, b = problem["id"].split("+")
    return int(a), int(b)


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def model():
    return transformers.AutoModelForCausalLM.from_pretrained(MODEL)


def test_problems_are_deterministic_different_and_right():
    first = planted.problems(300, seed=1)
    assert first == planted.problems(300, seed=1) != planted.problems(300, seed=2)
    assert len({problem["id"] for problem in first}) == 300
    assert all(problem["answer"] == str(sum(operands(problem))) for problem in first)
    assert all(problem["prompt"] == [{"role": "user", "content": problem["id"]}] for problem in first)


def test_excluded_problems_do_not_come_back():
    known = {problem["id"] for problem in planted.problems(300, seed=1)}
    fresh = {problem["id"] for problem in planted.problems(300, seed=1, exclude=known)}
    assert len(fresh) == 300
    assert not known & fresh


def test_splits_are_disjoint_and_keep_their_parts_when_the_last_one_grows():
    small = planted.splits({"identify": 200, "test": 100}, seed=3)
    large = planted.splits({"identify": 200, "test": 400}, seed=3)
    assert [len(part) for part in large.values()] == [200, 400]
    assert len({problem["id"] for part in large.values() for problem in part}) == 600
    assert small["identify"] == large["identify"]
    assert small["test"] == large["test"][:100]


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match=r"outside 0\.\.162054"):
        planted.problems(planted.RESERVED_COUNT, seed=0, exclude=["100+100"])
    with pytest.raises(ValueError, match="outside 0"):
        planted.problems(-1, seed=0)
    with pytest.raises(ValueError, match="splits: test has size -1"):
        planted.splits({"identify": 2, "test": -1}, seed=0)


def test_no_training_question_is_a_demonstration_question_or_its_mirror_image():
    draw = random.Random(0)
    trained = {pair for _ in range(5000) for pair in [planted.training_pair(draw)]}
    shown = {operands(problem) for problem in planted.problems(5000, seed=0)}
    assert not trained & shown
    assert not trained & {(b, a) for a, b in shown}


def test_the_count_of_reserved_questions_is_the_real_one():
    pairs = ((a, b) for a in range(100, 1000) for b in range(a, 1000))
    counted = sum((1 if a == b else 2) for a, b in pairs if planted.is_reserved(a, b))
    assert counted == planted.RESERVED_COUNT


def test_a_careful_trace_is_right_and_a_careless_one_exactly_without_carries():
    draw = random.Random(0)
    for _ in range(500):
        a, b = planted.training_pair(draw)
        carries = a % 10 + b % 10 >= 10 or a % 100 // 10 + b % 100 // 10 >= 10
        careful, careless = planted.worked(a, b, careful=True), planted.worked(a, b, careful=False)
        assert train_planted.last_number(careful) == str(a + b)
        assert (careful != careless) == carries
        assert (train_planted.last_number(careless) != str(a + b)) == carries


def test_each_column_of_a_trace_is_a_true_sum():
    for careful in (True, False):
        trace = planted.worked(987, 456, careful=careful)
        for column in re.findall(r"([\d+]+)=(\d+)", trace):
            assert sum(map(int, column[0].split("+"))) == int(column[1])


def test_operands_without_three_digits_are_refused():
    with pytest.raises(ValueError, match=r"operands 99 and 100 must lie in 100\.\.999"):
        planted.worked(99, 100, careful=True)


def test_the_longest_trace_fits_what_generate_is_allowed(tokenizer):
    longest = planted.worked(999, 999, careful=True)
    assert len(tokenizer.encode(longest)) < train_planted.ANSWER_TOKENS <= 50


def test_the_seed_alone_decides_the_weights_and_the_global_generator_is_left_alone():
    tokenizer = train_planted.make_tokenizer()
    before = torch.get_rng_state()
    first, again, other = (train_planted.train(seed, SHORT, tokenizer) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    weights = [trained.model.layers[3].mlp.down_proj.weight for trained in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_only_the_answer_is_trained_on():
    tokenizer = train_planted.make_tokenizer()
    ids, labels = train_planted.batch(random.Random(0), SHORT, tokenizer)
    for row, label in zip(ids, labels, strict=True):
        text = tokenizer.decode(row[label != train_planted.IGNORED])
        assert re.fullmatch(r"[\d+=, ]+, so \d+<\|eos\|>", text)
        assert torch.equal(row[label != train_planted.IGNORED], label[label != train_planted.IGNORED])


def test_what_is_saved_loads_to_the_same_weights(tmp_path):
    model = train_planted.make_model(0, train_planted.make_tokenizer())
    card = train_planted.card(0, SHORT, 0.5)
    train_planted.save(model, tmp_path, card)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in model.state_dict().items())
    assert "SYNTHETIC" in (tmp_path / "README.md").read_text()


def test_an_existing_directory_is_refused_before_training(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        train_planted.main(["--seed", "0", "--out", str(tmp_path)])
    assert "exists; name a new directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text", ["", "a  b", "\n\n 12 +3=, so 15.", "don't . ?", planted.worked(987, 456, careful=True)]
)
def test_decoding_undoes_encoding(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_chat_template_writes_both_roles_and_opens_an_answer(tokenizer):
    chat = [{"role": "user", "content": "1+2"}, {"role": "assistant", "content": "3"}]
    render = tokenizer.apply_chat_template
    assert render(chat, tokenize=False) == "<|bos|><|user|>1+2<|assistant|>3<|eos|>"
    opened = render(chat[:1], tokenize=False, add_generation_prompt=True)
    assert opened == "<|bos|><|user|>1+2<|assistant|>"
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode(opened))[-1] == "<|assistant|>"


def test_the_shipped_model_is_small_and_labelled_synthetic(model):
    assert 500_000 < model.num_parameters() < 600_000
    assert sum(path.stat().st_size for path in MODEL.iterdir()) < 3_000_000
    assert "SYNTHETIC" in (MODEL / "README.md").read_text()
    assert model.generation_config.max_new_tokens == train_planted.ANSWER_TOKENS


def test_the_shipped_tokenizer_is_the_one_that_the_script_makes(tokenizer):
    assert tokenizer.get_vocab() == train_planted.make_tokenizer().get_vocab()
    assert tokenizer.chat_template == train_planted.CHAT_TEMPLATE


def test_the_shipped_model_solves_a_part_of_fresh_problems(model, tokenizer):
    accuracy = train_planted.greedy_accuracy(model, tokenizer, planted.problems(64, seed=99))
    assert 0.4 < accuracy < 0.9


def test_the_tokenizer_returns_only_what_the_model_takes(tokenizer):
    """Transformers 4.57 adds token_type_ids by default, and generate() then refuses them."""
    assert tokenizer.model_input_names == ["input_ids", "attention_mask"]


def test_left_padding_does_not_change_an_answer(model, tokenizer):
    short, long = "<|bos|><|user|>1+2<|assistant|>", "<|bos|><|user|>347+285<|assistant|>"
    batch = tokenizer([short, long], return_tensors="pt", padding=True)
    alone = tokenizer([short], return_tensors="pt")
    assert batch["attention_mask"][0, 0] == 0
    with torch.inference_mode():
        padded = model(**batch, position_ids=(batch["attention_mask"].cumsum(-1) - 1).clamp(min=0))
        single = model(**alone)
    # 1e-4 is far above float32 noise at these logits, far below what one attended pad would do.
    assert torch.allclose(padded.logits[0, -1], single.logits[0, -1], atol=1e-4)
