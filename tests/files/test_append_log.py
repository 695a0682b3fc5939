"""Files of finished batches."""

import json

import pytest

from adaras_export.errors import TraceError
from adaras_export.files import safe_read
from adaras_export.files.append_log import SealedLog

RECORDS = [{"way": "off", "questions": [one], "seconds": 0.1 * one} for one in range(5)]


@pytest.fixture
def path(tmp_path):
    """A journal of five lines."""
    journal = SealedLog(tmp_path / "j.jsonl", "abc")
    for record in RECORDS:
        journal.append(record)
    journal.close()
    return tmp_path / "j.jsonl"


def replayed(path, identity="abc"):
    found, journal = [], SealedLog(path, identity)
    try:
        journal.read(found.append)
    finally:
        journal.close()
    return found


def test_what_was_appended_is_read_and_appended_to(path):
    found, journal = [], SealedLog(path, "abc")
    journal.read(found.append)
    journal.append({"way": "more"})
    journal.close()
    assert found == RECORDS
    assert replayed(path) == [*RECORDS, {"way": "more"}]


def test_a_journal_of_any_size_is_read(tmp_path):
    """One of more than 4 MiB was refused: 440,000 answers were lost."""
    journal, line = SealedLog(tmp_path / "j.jsonl", "abc"), {"values": [0.123456789] * 100_000}
    for _ in range(5):
        journal.append(line)
    journal.close()
    assert (tmp_path / "j.jsonl").stat().st_size > safe_read.LARGEST
    assert replayed(tmp_path / "j.jsonl") == [line] * 5


def test_a_line_that_is_longer_than_any_of_ours_is_refused(path, monkeypatch):
    monkeypatch.setattr(safe_read, "LARGEST", 150)
    path.write_bytes(path.read_bytes() + b"[" * 200)
    with pytest.raises(TraceError, match=r"j\.jsonl:7: is longer than 150 bytes; expected the journal"):
        replayed(path)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda lines: [*lines[:3], lines[3].replace(b"[2]", b"[4]"), *lines[4:]], 4),
        (lambda lines: [*lines, lines[-1]], 7),
        (lambda lines: [*lines[:2], lines[1], *lines[2:]], 3),
        (lambda lines: [*lines[:2], *lines[3:]], 3),
        (lambda lines: [*lines[:2], lines[3], lines[2], *lines[4:]], 3),
        (lambda lines: [*lines, b'{"way": "off"}\n'], 7),
        (lambda lines: [*lines, b"[1]\n"], 7),
    ],
    ids=["edited", "doubled at the end", "doubled", "removed", "moved", "without a seal", "no object"],
)
def test_a_line_that_is_not_as_it_was_written_is_refused_by_its_number(path, change, line):
    content = b"".join(change(path.read_bytes().splitlines(keepends=True)))
    path.write_bytes(content)
    with pytest.raises(TraceError, match=rf"j\.jsonl:{line}: is not as it was written: edited, doubled, moved"):
        replayed(path)
    assert path.read_bytes() == content


@pytest.mark.parametrize("kept", range(1, 200, 7))
def test_a_journal_that_was_cut_anywhere_goes_on_from_its_whole_lines(path, kept):
    whole = path.read_bytes()
    path.write_bytes(whole[:kept])
    found, journal = [], SealedLog(path, "abc")
    journal.read(found.append)
    for record in RECORDS[len(found) :]:
        journal.append(record)
    journal.close()
    assert found == RECORDS[: max(0, whole[:kept].count(b"\n") - 1)]
    assert path.read_bytes() == whole


def test_a_second_process_is_refused_until_the_first_one_ends(path, tmp_path):
    first = SealedLog(path, "abc")
    first.read(lambda line: None)
    with pytest.raises(TraceError, match=r"j\.jsonl: another process is writing it; wait until it ends, or choose"):
        replayed(path)
    first.close()
    assert replayed(path) == RECORDS
    late = SealedLog(tmp_path / "new.jsonl", "abc")
    late.read(lambda line: None)
    other = SealedLog(tmp_path / "new.jsonl", "abc")
    other.append(RECORDS[0])
    other.close()
    with pytest.raises(TraceError, match=r"new\.jsonl: another process is writing it"):
        late.append(RECORDS[1])
    assert replayed(tmp_path / "new.jsonl") == RECORDS[:1]


def test_a_refused_journal_is_free_for_others(path):
    with pytest.raises(TraceError, match="was written with other questions") as kept:
        replayed(path, "another")
    assert kept.value.__traceback__ is not None
    assert replayed(path) == RECORDS


def test_lines_are_json_for_everybody(path):
    assert [json.loads(line) for line in path.read_text().splitlines()][1:] == [
        {**record, "seal": json.loads(line)["seal"]}
        for record, line in zip(RECORDS, path.read_text().splitlines()[1:], strict=True)
    ]
