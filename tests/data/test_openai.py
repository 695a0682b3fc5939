"""Attempts as requests to a real server on loopback, which may fail in every way."""

import os
import signal
import time

import pytest
from completions import Completions, text_of
from processes import ended, forked

from adaras_export.core.trace_files import read_traces
from adaras_export.core.traces import Question
from adaras_export.data.backends.openai import Endpoint, EndpointBackend, completion_of
from adaras_export.data.checkers import last_number
from adaras_export.data.collect import CollectOptions, collect_from
from adaras_export.data.sampling_plan import Attempt, Goal
from adaras_export.errors import EndpointError
from adaras_export.modeling.generation import Sampling, row_seed

pytest.importorskip("openai")
TALK = [Question(f"q{n}", [{"role": "user", "content": f"What is {n}?"}], "3") for n in range(4)]
TEXT = [Question("t", "1 + 2 =", "3")]


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def server():
    with Completions() as server:
        yield server


@pytest.fixture
def run(server, tmp_path):
    """`collect_from` the server, 5 attempts, into t.jsonl; settings of the endpoint, the goal or the sampling."""

    def go(questions=TALK, *, goal=None, sampling=None, name="t.jsonl", **settings):
        endpoint = Endpoint(server.url, settings.pop("model", "teacher"), **settings)
        backend = EndpointBackend(endpoint, sampling or Sampling(9, temperature=0.7, top_p=0.9, seed=5))
        goal = goal or Goal(5)
        return collect_from(backend, questions, tmp_path / name, goal=goal, options=CollectOptions(last_number, 4))

    return go


def test_every_attempt_is_asked_once_with_its_own_seed_and_checked(run, server, tmp_path):
    report = run()
    traces = {trace.id: trace for trace in read_traces(tmp_path / "t.jsonl")}
    seeds = {f"q{n}#{m}": row_seed(5, f"q{n}#{m}", 31) for n in range(4) for m in range(5)}
    assert {key: trace.completion for key, trace in traces.items()} == {key: text_of(seeds[key]) for key in seeds}
    assert server.asked() == dict.fromkeys(seeds.values(), 1)
    assert all(trace.correct == trace.completion.endswith("3") for trace in traces.values())
    assert (report.traces, report.cut, report.blank) == (20, 0, 0)
    assert 0 < report.correct < 20


def test_messages_go_to_the_chat_and_text_does_not(run, server):
    run(TALK[:1], goal=Goal(1), sampling=Sampling(9, 0.7, 0.9, 5, stop="\n"))
    run(TEXT, goal=Goal(1), name="text.jsonl")
    (_, chat, talked, _), (_, plain, written, _) = server.log
    assert (chat, plain) == ("/v1/chat/completions", "/v1/completions")
    assert talked["messages"] == [{"role": "user", "content": "What is 0?"}]
    assert written["prompt"] == "1 + 2 ="
    assert talked["stop"] == ["\n"]
    assert "stop" not in written
    assert (written["max_tokens"], written["temperature"], written["top_p"]) == (9, 0.7, 0.9)


def test_no_more_requests_are_under_way_than_may_be(run, server):
    server.delay = 0.02
    run(concurrency=3)
    assert server.most == 3


def test_requests_keep_the_pace_and_so_do_retries(run, server):
    server.faults = [500, 429]
    run(TALK[:1], goal=Goal(3), per_minute=1200)
    times = [at for at, *_ in server.log]
    assert len(times) == 5
    assert times[-1] - times[0] >= 4 * 0.05 - 0.02


def test_a_request_is_tried_again_after_429_500_and_a_lost_connection(run, server, tmp_path):
    server.faults = [429, 500, "drop", 503]
    report = run(concurrency=4)
    assert (report.traces, len(server.log)) == (20, 24)
    assert len({trace.id for trace in read_traces(tmp_path / "t.jsonl")}) == 20


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (401, r"answers 401 \(.*\); expected a valid key in the environment"),
        (404, r"answers 404 .* expected the name of a model that it serves"),
        (429, r"answers 429 .* lower --concurrency"),
        (400, r"trace q\d#0: answers 400 .*; see what the server says"),
        ({"choices": []}, r"answered trace q\d#\d with something without exactly one choice"),
        ({"choices": [{"message": {"content": 7}}]}, "with a content of type int"),
        ("page", "with something without exactly one choice; expected a completion, of an address such as"),
    ],
)
def test_what_cannot_be_mended_is_one_line_without_the_key(run, server, fault, message):
    server.faults = [fault] * 9
    with pytest.raises(EndpointError, match=message) as caught:
        run(retries=1, concurrency=1, key="sk-secret")
    assert "sk-secret" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert server.log[0][3] == "Bearer sk-secret"


@pytest.mark.parametrize("key", ["sk-seçret", "sk-secret\n"])
def test_a_key_that_no_header_can_hold_is_refused_and_not_shown(key):
    """Symptom: a traceback out of the HTTP client, after the model's questions were read."""
    with pytest.raises(EndpointError, match=r"^endpoint: its key .*; expected ASCII, in one line$") as caught:
        Endpoint("http://127.0.0.1:8000/v1", "teacher", key)
    assert "sk-" not in str(caught.value)


def test_a_model_that_is_not_served_is_named(run):
    with pytest.raises(EndpointError, match=r"model other, trace q\d#\d: answers 404 \(.*`other` does not exist"):
        run(model="other")


def test_a_server_that_is_not_there_is_told_at_once(tmp_path):
    backend = EndpointBackend(Endpoint("http://127.0.0.1:9/v1", "teacher"), Sampling(9))
    started = time.monotonic()
    with pytest.raises(EndpointError, match=r"cannot be reached \(.*\); expected a running server"):
        collect_from(backend, TEXT, tmp_path / "t.jsonl", goal=Goal(1), options=CollectOptions(last_number, 4))
    assert time.monotonic() - started < 5  # with all retries it would be twenty


def test_an_answer_that_takes_too_long_is_told(run, server):
    server.delay = 0.3
    with pytest.raises(EndpointError, match=r"no answer in 0\.1 s; give it more time"):
        run(timeout=0.1, retries=0)


def test_what_arrived_before_an_error_is_kept_and_not_asked_for_again(run, server, tmp_path):
    server.faults = [None] * 7 + [400]
    with pytest.raises(EndpointError):
        run(concurrency=1)
    assert len(read_traces(tmp_path / "t.jsonl")) == 7
    report = run()
    assert (report.resumed, report.traces) == (7, 20)
    assert sorted(server.asked().values()) == [1] * 19 + [2]  # the one that failed


def test_a_caller_that_fails_ends_the_requests_under_way(server):
    server.delay = 0.2
    backend = EndpointBackend(Endpoint(server.url, "teacher", concurrency=2), Sampling(9))
    pieces = backend.complete([*_batch(backend, 8)], {f"t#{n}" for n in range(8)})
    next(pieces)
    pieces.close()
    assert len(server.log) <= 4


def test_whoever_wants_to_leave_need_not_wait_for_answers(run, server):
    server.delay = 5

    def leave(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, leave)
    started = time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, 0.8)
    try:
        with pytest.raises(KeyboardInterrupt):
            run()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - started < 4


def _batch(backend, count):
    return [Attempt(f"t#{n}", question) for question in backend.arranged(TEXT) for n in range(count)]


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning"])
def test_reasoning_that_is_kept_apart_stands_before_the_answer(run, server, tmp_path, key):
    server.extra = {key: "\nTwo and one.\n"}
    run(TALK[:1], goal=Goal(1))
    [trace] = read_traces(tmp_path / "t.jsonl")
    assert trace.completion == "<think>\nTwo and one.\n</think>\n\n" + text_of(row_seed(5, "q0#0", 31))


def test_reasoning_that_was_cut_off_stays_open():
    message = {"content": None, "reasoning_content": "Two and"}
    found = completion_of({"choices": [{"finish_reason": "length", "message": message}]})
    assert (found.text, found.cut) == ("<think>\nTwo and", True)


def test_half_a_character_becomes_a_question_mark():
    assert completion_of({"choices": [{"text": "a\ud800"}]}).text == "a?"


def test_completions_at_the_limit_are_counted(run):
    assert run(sampling=Sampling(2, temperature=1.0)).cut == 20


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"url": "127.0.0.1:8000"}, "expected an address such as"),
        ({"url": "http://me:secret@host/v1"}, "holds a name or password"),
        ({"concurrency": 0}, "concurrency 0"),
        ({"per_minute": 0}, "requests per minute 0"),
        ({"retries": -1}, "retries -1"),
        ({"timeout": 0}, "timeout 0"),
    ],
)
def test_settings_outside_their_range_are_refused(settings, message):
    with pytest.raises(EndpointError, match=message):
        Endpoint(**{"url": "http://127.0.0.1:1/v1", "model": "m", **settings})


def test_the_key_is_not_in_the_text_of_the_settings():
    assert "sk-secret" not in repr(Endpoint("http://127.0.0.1:1/v1", "m", key="sk-secret"))


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_without_loss_or_duplicates(run, server, tmp_path):
    server.delay = 0.05
    traces = tmp_path / "t.jsonl"
    child = forked(lambda: run(goal=Goal(6), concurrency=2) and 0, tmp_path / "log")
    while not (traces.is_file() and traces.read_bytes().count(b"\n") >= 5):
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    assert ended([child]) == [-signal.SIGKILL]
    before = traces.read_bytes()
    assert 5 <= before.count(b"\n") < 24
    run(goal=Goal(6), concurrency=2)
    assert traces.read_bytes().startswith(before[: before.rindex(b"\n") + 1])
    assert sorted(trace.id for trace in read_traces(traces)) == [f"q{n}#{m}" for n in range(4) for m in range(6)]
    assert sum(server.asked().values()) <= 24 + 2  # those under way were lost
