"""Readings as jobs of chunks: shared, merged, killed and resumed, with the bytes of a run that nobody disturbed."""

import json
import os
import signal
from dataclasses import replace
from functools import reduce

import numpy as np
import oracle
import processes
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaras_export.core.traces import Trace, digest
from adaras_export.discovery.identify import IdentifyOptions, identify, job_of, ranked_part, read_stats
from adaras_export.discovery.reading_job import Job, Part, ReadingPlan, merged
from adaras_export.errors import ArtifactError, RuleError, TraceError
from adaras_export.modeling.activations import Reading

TRACES = [
    Trace(f"{n}#{attempt}", str(n), f"{n}+{n}=", text, text.endswith(str(2 * n)))
    for n in range(1, 10)
    for attempt, text in enumerate((str(2 * n), f"it is {2 * n}", f"no {2 * n}?", "hm, 0."))
]
SMALL = Reading(token_budget=8)  # each question is a chunk of its own


@pytest.fixture
def job(stock, tokenizer, bases):
    """A job of nine chunks."""

    def make(ranking="paper", reading=SMALL, traces=TRACES, name="qwen3"):
        return job_of(stock[name], tokenizer, traces, bases[name], IdentifyOptions(ranking), reading)

    return make


@given(st.lists(st.integers(1, 100), max_size=20), st.integers(1, 6))
def test_every_chunk_is_in_one_share_and_shares_are_even(tokens, count):
    plan = ReadingPlan(tuple(() for _ in tokens), tuple(tokens), 128, 0, 0)
    shares = [plan.share(index, count) for index in range(count)]
    assert sorted(chunk for share in shares for chunk in share) == [*range(len(tokens))]
    loads = [sum(tokens[chunk] for chunk in share) for share in shares]
    assert max(loads) - min(loads) <= max(tokens, default=0)


@pytest.mark.parametrize(
    ("count", "ranking"), [(2, "paper"), (4, "paper"), pytest.param(3, "attribution", marks=pytest.mark.slow)]
)
def test_shards_merge_to_the_bytes_of_the_whole(count, ranking, job, tmp_path):
    whole = job(ranking).read(range(9))
    for index in range(count):
        job(ranking).read(job(ranking).plan.share(index, count)).save(tmp_path / str(index))
    parts = {str(index): Part.load(tmp_path / str(index)) for index in reversed(range(count))}
    assert merged(parts) == whole
    found = [ranked_part(one, None, IdentifyOptions(ranking, 30)).neurons for one in (whole, merged(parts))]
    assert found[0] == found[1]


def test_the_whole_of_a_job_is_what_identify_ranks(job, stock, tokenizer, bases):
    whole = job().read(range(9))
    found = identify(stock["qwen3"], tokenizer, TRACES, bases["qwen3"], IdentifyOptions(keep=30), reading=SMALL)
    assert found.stats == whole.stats
    assert found.neurons == ranked_part(whole, None, IdentifyOptions(keep=30)).neurons


def test_parts_that_do_not_make_a_whole_are_refused_by_name(job):
    one, other = (job().read(job().plan.share(index, 2)) for index in (0, 1))
    with pytest.raises(TraceError, match=r"one: 5 of 9 chunks are in none of them \(the first is 0\); expected"):
        merged({"one": one})
    with pytest.raises(TraceError, match="again: holds chunk 2, as does one; expected each once"):
        merged({"one": one, "other": other, "again": one})
    foreign = replace(other, key={**other.key, "token_budget": 99})
    with pytest.raises(TraceError, match=r"foreign: is of another reading than one \(token_budget: 8 and 99\)"):
        merged({"one": one, "foreign": foreign})
    with pytest.raises(TraceError, match="none given"):
        merged({})
    with pytest.raises(TraceError, match="of different readings"):
        one.merge(foreign)
    with pytest.raises(TraceError, match="chunk 2 is in both"):
        one.merge(one)


def test_a_part_without_gradients_cannot_be_ranked_by_them(job):
    with pytest.raises(RuleError, match="attribution needs gradients, which were not read"):
        ranked_part(job().read(range(9)), None, IdentifyOptions("attribution", 5))


def test_a_damaged_part_is_refused(job, tmp_path):
    part = job().read([0])
    part.save(tmp_path / "part")
    assert Part.load(tmp_path / "part") == part
    (tmp_path / "part").write_bytes((tmp_path / "part").read_bytes()[:-9])
    with pytest.raises(ArtifactError, match="expected a part of a reading file"):
        Part.load(tmp_path / "part")
    with pytest.raises(RuleError, match="chunk is -1; expected a count"):
        replace(part, done=(-1,))
    with pytest.raises(RuleError, match="key is no object"):
        replace(part, key=None)


def counting(job, path, die_at=None):
    """The job, noting each chunk that is read as a line of the file, and killed at the one of that number."""

    def read_chunk(chunk):
        with path.open("a") as file:
            file.write(f"{chunk[0][0].question_id}\n")
        if die_at is not None and len(path.read_text().split()) == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return job.read_chunk(chunk)

    return Job(job.plan, job.empty, read_chunk)


@pytest.mark.parametrize("ranking", ["paper", pytest.param("attribution", marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_with_the_next_chunk_and_ends_with_the_same_bytes(ranking, job, tmp_path, monkeypatch):
    monkeypatch.setattr("adaras_export.discovery.reading_job._PATIENCE", 0)  # the file is written after each chunk
    partial, whole = tmp_path / "out.partial", job(ranking).read(range(9))
    for number in range(1, 9):  # each run reads one chunk and dies in the next
        seen = tmp_path / f"seen{number}"
        dying = counting(job(ranking), seen, die_at=2)
        child = processes.forked(lambda dying=dying: dying.read(range(9), partial) and 0, tmp_path / "log")
        assert processes.ended([child]) == [-signal.SIGKILL]
        assert seen.read_text().split() == [str(number), str(number + 1)]
    last = counting(job(ranking), tmp_path / "last")
    assert last.read(range(9), partial) == whole
    assert (tmp_path / "last").read_text().split() == ["9"]


def test_the_file_is_written_in_a_twentieth_of_the_time(job, tmp_path, monkeypatch):
    saved, save = [], Part.save
    monkeypatch.setattr(Part, "save", lambda self, path: (saved.append(self.done), save(self, path)))
    monkeypatch.setattr("adaras_export.discovery.reading_job._PATIENCE", 1e9)
    job().read(range(9), tmp_path / "out.partial")
    assert saved == [(0,)]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"reading": replace(SMALL, tokens="completion")}, "tokens: all and completion"),
        ({"ranking": "attribution"}, "attribution: None and last_prompt_token"),
        ({"traces": TRACES[:-4]}, "traces: "),
    ],
)
def test_a_file_of_another_run_is_refused(change, said, job, tmp_path):
    job().read([0], tmp_path / "out.partial")
    with pytest.raises(TraceError, match=f"out.partial: is of an unfinished run with other input .*{said}.*delete"):
        job(**change).read(range(5), tmp_path / "out.partial")
    with pytest.raises(TraceError, match="read other chunks; delete the file"):
        job().read([1, 2], tmp_path / "out.partial")


LONG = Trace("long", "1", "1+1=", "2" * 140, True)


def test_traces_beyond_the_context_are_refused_unless_it_was_decided(job, stock, tokenizer, bases):
    traces = [*TRACES, LONG]
    refusal = r"1 of 37 exceed the model's context of 128 tokens \(the longest, long, has 144\).*skip.*or read"
    with pytest.raises(TraceError, match=refusal):
        job(traces=traces)
    left_out = job(traces=traces, reading=replace(SMALL, too_long="skip"))
    assert (left_out.plan.skipped, left_out.plan.beyond, left_out.plan.context) == (1, 0, 128)
    assert left_out.read(range(9)).stats == job().read(range(9)).stats
    part = left_out.read(range(9))
    assert ranked_part(part, None, IdentifyOptions(keep=3)).as_record()["skipped_traces"] == 1
    read = job(traces=traces, reading=replace(SMALL, too_long="read"))
    assert (read.plan.skipped, read.plan.beyond) == (0, 1)
    assert read.read(range(9)).stats.trace_count == 37


def test_a_model_with_learned_positions_cannot_read_beyond_its_context(job):
    with pytest.raises(TraceError, match=r"--too-long says: leave them out \(skip\)$"):
        job(traces=[*TRACES, LONG], reading=replace(SMALL, too_long="read"), name="gpt2")


def test_a_question_whose_only_wrong_traces_are_too_long_is_left_out(job):
    traces = [*TRACES, Trace("a", "new", "new?", "yes", True), Trace("b", "new", "new?", "n" * 200, False)]
    plan = job(traces=traces, reading=replace(SMALL, too_long="skip")).plan
    assert digest("new?") not in {digest(q[0].prompt) for chunk in plan.chunks for q in chunk}


def test_only_the_completion_can_be_averaged(stock, tokenizer, bases):
    own = TRACES[:4]
    model, base = stock["qwen3"], bases["qwen3"]
    found = read_stats(model, tokenizer, own, base, reading=Reading(tokens="completion", chunk_tokens=3))
    assert found.tokens == "completion"
    h = {t.id: activations(model, tokenizer, t) for t in own}
    for label, mean in zip((True, False), found.means(), strict=True):
        np.testing.assert_allclose(mean, np.mean([h[t.id] for t in own if t.correct is label], 0), atol=2e-5)


def activations(model, tokenizer, trace):
    """The mean over a trace's completion, (L, M)."""
    prompt = len(tokenizer(trace.prompt)["input_ids"])
    return np.array(oracle.activations_of(model, tokenizer(trace.prompt + trace.completion)["input_ids"]))[
        :, prompt:
    ].mean(1)


def test_what_is_told_is_json(job):
    part = reduce(Part.merge, [job().read([at]) for at in range(9)])
    found = ranked_part(part, None, IdentifyOptions(keep=10))
    record = json.loads(json.dumps(found.as_record()))
    assert (record["tokens"], record["split_half_neurons"]) == ("all", 10)
    assert 0 <= record["split_half_overlap"] <= 1
    assert f"the best 10 of two halves of the questions share {record['split_half_overlap']:.0%}" in found.line()
