"""Sampling labelled traces into a file that survives interruption."""

import os
import signal
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from places import ROOT
from tokenizers import Tokenizer, decoders, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from adaras_export.core.base_model import BaseModel
from adaras_export.core.neuron_stats import NeuronStats
from adaras_export.core.trace_files import read_traces, write_traces
from adaras_export.core.traces import Question, by_question
from adaras_export.data.collect import CollectOptions, Recording, collect
from adaras_export.data.sampling_plan import Goal
from adaras_export.discovery.identify import read_stats
from adaras_export.errors import TraceError
from adaras_export.modeling.generation import Sampling
from adaras_export.modeling.loading import load_model

QUESTIONS = [Question(f"q{n}", f"{n}+{n}=", str(2 * n)) for n in range(5)]
SAMPLING = Sampling(6, temperature=1.5, seed=3)


def has_even_sum(completion, answer):
    """A verdict that random text gets right about every second time."""
    return sum(completion.encode()) % 2 == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model over single ASCII characters, saved, as another process loads it too."""
    core = Tokenizer(models.BPE(vocab={chr(32 + n): n for n in range(95)}, merges=[]))
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.3,
    )
    path = tmp_path_factory.mktemp("model")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def loaded(folder):
    return load_model(folder, device="cpu")


def grouped(changes):
    """The arguments of `collect` for 4 attempts in batches of 6, with changes by the names of fields."""
    settings = {"attempts": 4, "sampling": SAMPLING, "check": has_even_sum, "batch_size": 6} | changes
    goal = {name: settings.pop(name) for name in ("attempts", "wanted", "per_class") if name in settings}
    options = {one.name: settings.pop(one.name) for one in fields(CollectOptions) if one.name in settings}
    return {"goal": Goal(**goal), "options": CollectOptions(**options), **settings}


@pytest.fixture
def run(loaded, tmp_path):
    """`collect` of 4 attempts at 5 questions in batches of 6, into t.jsonl, with changes."""

    def go(questions=QUESTIONS, name="t.jsonl", **changes):
        return collect(*loaded, questions, tmp_path / name, **grouped(changes))

    return go


def test_the_file_holds_every_attempt_in_the_order_of_the_questions(run, tmp_path):
    report = run()
    traces = read_traces(tmp_path / "t.jsonl")
    assert [trace.id for trace in traces] == [f"q{n}#{m}" for n in range(5) for m in range(4)]
    assert all(trace.correct == has_even_sum(trace.completion, "") for trace in traces)
    assert [trace.prompt for trace in traces[::4]] == [question.prompt for question in QUESTIONS]
    assert len({trace.completion for trace in traces}) > 15
    assert (report.traces, report.questions, report.resumed, report.blank) == (20, 5, 0, 0)


def test_the_report_counts_what_the_file_holds(run, tmp_path):
    report = run()
    traces = read_traces(tmp_path / "t.jsonl")
    labels = {question.id: {t.correct for t in traces if t.question_id == question.id} for question in QUESTIONS}
    assert report.correct == sum(trace.correct for trace in traces)
    assert report.mixed_questions == sum(len(seen) == 2 for seen in labels.values())
    assert 0 < report.correct < 20
    assert report.seconds > 0


def test_the_same_arguments_give_the_same_bytes_and_another_seed_others(run, tmp_path):
    run(name="a.jsonl")
    run(name="b.jsonl")
    run(name="c.jsonl", sampling=Sampling(6, temperature=1.5, seed=4))
    contents = [(tmp_path / f"{name}.jsonl").read_bytes() for name in "abc"]
    assert contents[0] == contents[1] != contents[2]


def test_a_completion_does_not_depend_on_the_batch_size(run, tmp_path):
    run(name="a.jsonl", batch_size=1)
    run(name="b.jsonl", batch_size=20)
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


def test_a_finished_file_is_resumed_without_a_change_or_a_sample(run, tmp_path, loaded):
    run()
    before = (tmp_path / "t.jsonl").read_bytes()
    hook = loaded[0].register_forward_pre_hook(lambda *args: pytest.fail("sampled again"))
    report = run()
    hook.remove()
    assert (tmp_path / "t.jsonl").read_bytes() == before
    assert (report.traces, report.resumed) == (20, 20)


def test_a_file_cut_anywhere_ends_with_the_bytes_of_the_uninterrupted_run(run, tmp_path):
    run()
    whole = (tmp_path / "t.jsonl").read_bytes()
    lines = [end + 1 for end, byte in enumerate(whole) if byte == ord("\n")]
    for cut in (0, 3, lines[2] - 1, lines[2], lines[5], lines[7] + 40, lines[18] + 9, len(whole) - 1):
        (tmp_path / "t.jsonl").write_bytes(whole[:cut])
        run()
        assert (tmp_path / "t.jsonl").read_bytes() == whole


CHILD = """
import os, signal, sys
from adaras_export.data.collect import CollectOptions, collect
from adaras_export.data.sampling_plan import Goal
from adaras_export.modeling.generation import Sampling
from adaras_export.modeling.loading import load_model
from adaras_export.core.traces import Question

def progress(done, total):
    if done == 12:
        with open(sys.argv[2], "ab") as file:  # the next batch, killed while it is written
            file.write(b'{"id": "q3#0", "ques')
        os.kill(os.getpid(), signal.SIGKILL)

def has_even_sum(completion, answer):
    return sum(completion.encode()) % 2 == 0

questions = [Question(f"q{n}", f"{n}+{n}=", str(2 * n)) for n in range(5)]
collect(
    *load_model(sys.argv[1], device="cpu"), questions, sys.argv[2], goal=Goal(4),
    sampling=Sampling(6, temperature=1.5, seed=3), options=CollectOptions(has_even_sum, 6, progress=progress),
)
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_bytes_of_the_uninterrupted_one(run, folder, tmp_path):
    killed = tmp_path / "killed.jsonl"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, "-c", CHILD, str(folder), str(killed)]
    child = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert child.returncode == -signal.SIGKILL, child.stderr.decode()
    assert killed.read_bytes().count(b"\n") == 12
    report = run(name=killed.name)
    run(name="whole.jsonl")
    assert report.resumed == 12
    assert killed.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_progress_reports_every_batch(run):
    calls = []
    run(progress=lambda done, total: calls.append((done, total)))
    assert calls == [(6, 20), (12, 20), (18, 20), (20, 20)]


def test_wanted_stops_as_soon_as_enough_questions_have_both_outcomes(run, tmp_path):
    run(batch_size=4)
    whole = (tmp_path / "t.jsonl").read_bytes()
    report = run(name="some.jsonl", batch_size=4, wanted=2)
    some = (tmp_path / "some.jsonl").read_bytes()
    assert report.mixed_questions == 2
    assert whole.startswith(some)
    assert report.traces < 20


def test_wanted_stops_at_the_same_place_after_an_interruption(run, tmp_path):
    run(wanted=2)
    whole = (tmp_path / "t.jsonl").read_bytes()
    for cut in range(1, whole.count(b"\n")):
        (tmp_path / "t.jsonl").write_bytes(b"".join(whole.splitlines(keepends=True)[:cut]))
        run(wanted=2)
        assert (tmp_path / "t.jsonl").read_bytes() == whole


def test_more_attempts_later_keep_the_first_ones(run, tmp_path):
    run(attempts=2)
    first = (tmp_path / "t.jsonl").read_bytes()
    report = run(attempts=3)
    assert (tmp_path / "t.jsonl").read_bytes().startswith(first)
    assert (report.resumed, report.traces) == (10, 15)
    run(attempts=3, name="at_once.jsonl")
    assert set(read_traces(tmp_path / "t.jsonl")) == set(read_traces(tmp_path / "at_once.jsonl"))


def test_a_file_of_other_questions_is_refused_and_left_as_it_is(run, tmp_path):
    run()
    before = (tmp_path / "t.jsonl").read_bytes()
    for others, message in (
        ([QUESTIONS[0], Question("q1", "something else", "1"), *QUESTIONS[2:]], "trace q1#0 has another prompt than q"),
        (QUESTIONS[1:], "holds question q0, which is not among the 4 given; expected all questions of the file"),
        ([Question("test", "1=", "1")], "holds question q0, which is not among the 1 given"),
    ):
        with pytest.raises(TraceError, match=message):
            run(questions=others)
        assert (tmp_path / "t.jsonl").read_bytes() == before


def test_new_questions_beside_those_of_the_file_are_added(run, tmp_path):
    run(questions=QUESTIONS[:2])
    before = (tmp_path / "t.jsonl").read_bytes()
    report = run()
    assert (report.resumed, report.traces, report.questions) == (8, 20, 5)
    assert (tmp_path / "t.jsonl").read_bytes().startswith(before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampling": Sampling(2, temperature=1.5, seed=3)}, r"max_new_tokens 6 \(now 2\); expected the same settings"),
        ({"sampling": Sampling(6, 0.1, 0.5, seed=3)}, r"temperature 1.5 \(now 0.1\), top_p 1.0 \(now 0.5\);"),
        ({"sampling": Sampling(6, 1.5, seed=3, stop="\n")}, r'stop null \(now "\\n"\)'),
        ({"check": lambda completion, answer: True}, r'check "has_even_sum" \(now "<lambda>"\)'),
        ({"revision": "beef"}, r'revision null \(now "beef"\)'),
    ],
)
def test_a_file_of_other_settings_is_refused_by_their_names_also_where_it_is_complete(run, tmp_path, changes, message):
    """Traces of two limits of tokens made 10 of 17 "both outcomes" that were whole against cut off."""
    run()
    before = (tmp_path / "t.jsonl").read_bytes()
    for attempts in (4, 5):
        with pytest.raises(TraceError, match=rf"t\.jsonl: trace q0#0 was sampled with {message}"):
            run(attempts=attempts, **changes)
    assert (tmp_path / "t.jsonl").read_bytes() == before


def test_precision_and_template_are_settings_too(loaded, run, tmp_path, monkeypatch):
    run()
    (settings,) = {tuple(trace.settings.items()) for trace in read_traces(tmp_path / "t.jsonl")}
    assert dict(settings) == {
        "backend": "transformers",
        **vars(SAMPLING),
        "dtype": "float32",
        "template": None,
        "check": "has_even_sum",
        "revision": None,
    }
    monkeypatch.setattr(loaded[1], "chat_template", "{{ messages }}")
    with pytest.raises(TraceError, match=r'template null \(now "[0-9a-f]{16}"\)'):
        run()


def test_a_file_of_an_earlier_version_is_gone_on_with_and_its_unknown_settings_are_counted(run, tmp_path):
    """Until this version, traces did not say how they were sampled."""
    path = tmp_path / "t.jsonl"
    run(attempts=2)
    write_traces(path, [replace(trace, settings=None) for trace in read_traces(path)])
    assert b"settings" not in path.read_bytes()
    report = run()
    assert (report.traces, report.resumed, report.unlabelled) == (20, 10, 10)
    assert report.cautions() == [
        "10 traces of an earlier version do not say how they were sampled: whether limit of tokens, temperature, "
        "template, checker and revision were those of this run is not known"
    ]
    with pytest.raises(TraceError, match="max_new_tokens 6"):
        run(sampling=Sampling(7, temperature=1.5, seed=3))


def test_of_two_runs_into_one_file_the_second_is_refused_in_one_line(run, tmp_path):
    """Both ended with status 0 and wrote every trace: the file had each twice, and no reader took it."""

    def again(done, total):
        with pytest.raises(TraceError, match=r"t\.jsonl: another process is writing it; wait until it ends"):
            run()

    assert run(progress=again).traces == 20
    assert run().resumed == 20, "the lock goes with the run"


def test_a_run_that_writes_nothing_leaves_no_file(run, tmp_path):
    with pytest.raises(ZeroDivisionError):
        run(check=lambda completion, answer: 1 // 0)
    assert not (tmp_path / "t.jsonl").exists()


@pytest.mark.parametrize(
    ("verdict", "said"),
    [
        (lambda completion, answer: False, "no trace is correct, so identify and gate cannot use the file; ask easier"),
        (lambda completion, answer: True, "no trace is incorrect, so identify and gate cannot use the file; ask hard"),
        (lambda completion, answer: answer == "0", "no question has both outcomes, so identify cannot contrast them"),
        (has_even_sum, None),
    ],
)
def test_a_file_that_cannot_be_contrasted_is_told(run, verdict, said):
    found = run(check=verdict).cautions()
    assert len(found) == (said is not None)
    assert all(one.startswith(said) for one in found)


def test_a_file_of_another_model_is_refused_and_left_as_it_is(loaded, tmp_path):
    def go(name):
        return collect(*loaded, QUESTIONS, path, **grouped({"attempts": 2, "name": name}))

    path = tmp_path / "t.jsonl"
    go("teacher")
    before = path.read_bytes()
    assert {trace.model for trace in read_traces(path)} == {"teacher"}
    with pytest.raises(
        TraceError, match=r"t\.jsonl: trace q0#0 was written by teacher; expected one of pupil, or a new"
    ):
        go("pupil")
    assert path.read_bytes() == before
    assert go("teacher").resumed == len(before.splitlines())


@pytest.mark.parametrize("content", ["no trace at all", "# a text\n", '{"other": 1}\n', '{"id": 1}'])
def test_a_file_that_is_not_ours_is_refused_and_left_as_it_is(run, tmp_path, content):
    path = tmp_path / "t.jsonl"
    path.write_text(content)
    with pytest.raises(TraceError, match=r"t\.jsonl:.* expected"):
        run()
    assert path.read_text().rstrip("\n") == content.rstrip("\n")


def test_an_attempt_without_text_is_counted_and_not_kept(run, tmp_path, loaded, monkeypatch):
    """A model may end at once; an empty completion has no token to read."""
    run()
    texts = [trace.completion for trace in read_traces(tmp_path / "t.jsonl")]
    end = texts[0][0]
    monkeypatch.setattr(loaded[0].generation_config, "eos_token_id", loaded[1].encode(end)[0])
    report = run(name="blank.jsonl")
    assert report.blank == sum(not text.partition(end)[0].strip() for text in texts)
    assert report.blank > 0
    assert report.traces == 20 - report.blank


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"questions": []}, "0 questions, batches of 6; expected at least one of each"),
        ({"attempts": 0}, "attempts is 0; expected 1 or more"),
        ({"batch_size": 0}, "batches of 0"),
        ({"questions": [QUESTIONS[1], QUESTIONS[1]]}, "question q1 is given twice"),
        ({"sampling": Sampling(6)}, "4 attempts at temperature 0 are equal; expected a temperature"),
    ],
)
def test_contradictory_arguments_are_refused_before_a_file_is_made(run, tmp_path, changes, message):
    with pytest.raises(TraceError, match=message):
        run(**changes)
    assert not (tmp_path / "t.jsonl").exists()


def test_one_greedy_attempt_is_fine(run):
    report = run(attempts=1, sampling=Sampling(6))
    assert report.traces + report.blank == 5


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_no_disk_space_is_one_clear_error(run):
    with pytest.raises(TraceError, match=r"/dev/full: cannot be written \(No space left on device\)"):
        run(name="/dev/full")


def test_a_full_disk_in_the_middle_leaves_a_file_to_go_on_with(run, tmp_path):
    """The limit of the file size makes the system refuse the bytes, as a full disk does."""
    resource = pytest.importorskip("resource")
    run(name="whole.jsonl")
    whole = (tmp_path / "whole.jsonl").read_bytes()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) // 2, before[1]))
    try:
        with pytest.raises(TraceError, match=r"t\.jsonl: cannot be written \(File too large\)"):
            run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert (tmp_path / "t.jsonl").stat().st_size == len(whole) // 2
    run()
    assert (tmp_path / "t.jsonl").read_bytes() == whole


def test_a_place_that_cannot_be_written_is_told_before_anything_is_sampled(run, tmp_path, loaded):
    hook = loaded[0].register_forward_pre_hook(lambda *args: pytest.fail("sampled"))
    for name in ("missing/t.jsonl", "."):
        with pytest.raises(TraceError, match="cannot be written"):
            run(name=name)
    hook.remove()


def test_a_run_with_full_classes_ends_with_the_same_bytes_after_an_interruption_anywhere(run, tmp_path):
    settings = {"attempts": 8, "per_class": 1, "batch_size": 3}
    report = run(**settings)
    whole = (tmp_path / "t.jsonl").read_bytes()
    assert 10 <= report.traces < 40
    assert report.mixed_questions == 5
    for cut in (0, len(whole) // 5, len(whole) // 2, len(whole) - 9):
        (tmp_path / "t.jsonl").write_bytes(whole[:cut])
        run(**settings)
        assert (tmp_path / "t.jsonl").read_bytes() == whole


def test_with_full_classes_every_question_has_them_or_all_its_attempts(run, tmp_path):
    run(attempts=6, per_class=2, batch_size=4)
    groups = by_question(read_traces(tmp_path / "t.jsonl"))
    for group in groups.values():
        correct = sum(trace.correct for trace in group)
        assert len(group) == 6 or (min(correct, len(group) - correct) >= 2 and len(group) in (4, 6))
    assert len(groups) == 5


def test_statistics_of_full_classes_are_those_that_identify_reads(run, loaded, folder, tmp_path):
    base = BaseModel.of(folder)
    run(attempts=8, per_class=1, batch_size=3, record=Recording(tmp_path / "stats", base))
    recorded, read = NeuronStats.load(tmp_path / "stats"), read_stats(*loaded, read_traces(tmp_path / "t.jsonl"), base)
    assert recorded.questions == read.questions
    assert recorded.trace_count == read.trace_count
    for name in ("correct_sum", "incorrect_sum", "difference_square_sum"):
        found, expected = (torch.tensor(getattr(one, name)) for one in (recorded, read))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_prompts_of_similar_length_are_beside_each_other_unless_the_first_may_be_the_last(run, tmp_path):
    questions = [
        Question("long", "1+1+1+1+1=", "5"),
        Question("short", "1=", "1"),
        Question("also long", "1+1+1+1=", "4"),
    ]
    run(questions)
    assert [*by_question(read_traces(tmp_path / "t.jsonl"))] == ["short", "also long", "long"]
    run(questions, name="wanted.jsonl", wanted=9)
    assert [*by_question(read_traces(tmp_path / "wanted.jsonl"))] == ["long", "short", "also long"]


def test_completions_that_reached_the_limit_are_counted(run, tmp_path):
    report = run()
    assert report.cut == sum(len(trace.completion) == 6 for trace in read_traces(tmp_path / "t.jsonl")) > 0


def test_attempts_with_the_text_of_another_one_are_counted(run, tmp_path):
    assert run(sampling=Sampling(1, temperature=0.01), name="few.jsonl").repeated > 10
    report = run()
    groups = by_question(read_traces(tmp_path / "t.jsonl")).values()
    assert report.repeated == 20 - sum(len({trace.completion for trace in group}) for group in groups)
