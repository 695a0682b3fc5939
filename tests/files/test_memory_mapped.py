"""Rows in a file: what comes back is what was read, also behind a kill, and no file of something else is used."""

import numpy as np
import pytest

from adaras_export.errors import TraceError
from adaras_export.files.memory_mapped import keep_rows

WIDTHS = [3, 1, 4, 2, 5]
GROUPS = [[4, 2], [0, 3], [1]]
KEY = {"model": "tiny", "prompts": 5}


def numbers(row):
    return np.arange(WIDTHS[row]) + 10 * row + 0.25


class Source:
    """Gives rows, and fails before a batch."""

    def __init__(self, fails_at=None):
        self.read, self.fails_at = [], fails_at

    def __call__(self, rows):
        if len(self.read) == self.fails_at:
            raise KeyboardInterrupt
        self.read.append(list(rows))
        return [numbers(row) for row in rows]


def test_rows_come_back_by_their_number(tmp_path):
    told = []
    kept = keep_rows(tmp_path / "kept", KEY, WIDTHS, GROUPS, Source(), lambda *done: told.append(done))
    assert len(kept) == 5
    for row in range(5):
        assert kept[row].tolist() == numbers(row).tolist()
    assert told == [(2, 5), (4, 5), (5, 5)]


@pytest.mark.parametrize("batches", [0, 1, 2, 3])
@pytest.mark.parametrize("torn", [0, 1, 7])
def test_a_run_that_was_stopped_reads_only_what_is_missing(batches, torn, tmp_path):
    """Also where the last batch was written in part."""
    whole, path = tmp_path / "whole", tmp_path / "kept"
    keep_rows(whole, KEY, WIDTHS, GROUPS, Source())
    first, second = Source(batches), Source()
    if batches < 3:
        with pytest.raises(KeyboardInterrupt):
            keep_rows(path, KEY, WIDTHS, GROUPS, first)
        with path.open("ab") as file:
            file.write(whole.read_bytes()[path.stat().st_size :][:torn])
    else:
        keep_rows(path, KEY, WIDTHS, GROUPS, first)
    kept = keep_rows(path, KEY, WIDTHS, GROUPS, second)
    done = batches + (batches == 2 and torn >= 4)  # the last batch is one number of 4 bytes
    assert second.read == GROUPS[done:]
    assert [kept[row].tolist() for row in range(5)] == [numbers(row).tolist() for row in range(5)]
    assert path.read_bytes() == whole.read_bytes()


def test_a_file_whose_first_line_was_not_finished_is_begun_anew(tmp_path):
    (tmp_path / "kept").write_bytes(b'{"model": "ti')
    kept = keep_rows(tmp_path / "kept", KEY, WIDTHS, GROUPS, Source())
    assert kept[4].tolist() == numbers(4).tolist()


def test_a_file_of_something_else_is_refused_and_says_what_differs(tmp_path):
    keep_rows(tmp_path / "kept", KEY, WIDTHS, GROUPS, Source())
    before = (tmp_path / "kept").read_bytes()
    with pytest.raises(TraceError, match=r"is of an unfinished run with other input \(prompts\); expected the same"):
        keep_rows(tmp_path / "kept", {**KEY, "prompts": 6}, WIDTHS, GROUPS, Source())
    assert (tmp_path / "kept").read_bytes() == before


@pytest.mark.parametrize("content", [b"a diary\n", b"\x00\xff", b"[1]\n"])
def test_a_file_that_is_none_of_ours_is_refused(content, tmp_path):
    (tmp_path / "kept").write_bytes(content)
    with pytest.raises(TraceError, match="it does not begin with a line of ours"):
        keep_rows(tmp_path / "kept", KEY, WIDTHS, GROUPS, Source())
    assert (tmp_path / "kept").read_bytes() == content


def test_a_folder_in_the_place_of_the_file_is_refused(tmp_path):
    with pytest.raises(TraceError, match=r"cannot be written .*expected a writable place"):
        keep_rows(tmp_path, KEY, WIDTHS, GROUPS, Source())


def test_more_than_the_disk_holds_is_refused_before_anything_is_read(tmp_path):
    source = Source()
    with pytest.raises(TraceError, match=r"needs 4000000000.0 GB .* are free; expected room; read fewer layers"):
        keep_rows(tmp_path / "kept", KEY, [10**18], [[0]], source)
    assert source.read == []
