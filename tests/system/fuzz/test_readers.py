"""Damage of every kind to valid files: a reader takes what it finds, or says in one printable line what is wrong."""

import json
import random

import pytest
from fuzz.mutations import mutated
from fuzz.readers import READERS, Reader, prepared, require_line, verdict
from hypothesis import given, settings
from hypothesis import strategies as st

from adaras_export.errors import ArtifactError
from adaras_export.files import atomic

each = pytest.mark.parametrize("name", READERS)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A folder for each reader, with what lies beside its file."""
    return {name: prepared(reader, tmp_path_factory.mktemp("reader")) for name, reader in READERS.items()}


@pytest.mark.slow
@each
def test_valid_files_are_taken(name, places):
    for seed in READERS[name].seeds():
        assert verdict(READERS[name], places[name], seed) is None


@pytest.mark.slow
@each
@settings(max_examples=60)
@given(data=st.data())
def test_a_damaged_file_is_taken_or_refused_in_one_line(name, places, data):
    reader = READERS[name]
    content = data.draw(st.sampled_from(reader.seeds()))
    verdict(reader, places[name], mutated(content, lambda limit: data.draw(st.integers(0, limit - 1))))


@pytest.mark.slow
@each
@settings(max_examples=40)
@given(content=st.binary(max_size=200))
def test_arbitrary_bytes_are_taken_or_refused_in_one_line(name, places, content):
    verdict(READERS[name], places[name], content)


@pytest.mark.slow
def test_a_reader_that_trusts_its_file_is_found_out(tmp_path):
    """The proof that the two properties above can fail."""
    seed = b'{"a": [1, 2.5, "x", null, true], "b": {}}'
    careless = Reader("value.json", lambda: [seed], lambda folder: json.loads((folder / "value.json").read_text())["b"])

    def outcome(number):
        try:
            verdict(careless, tmp_path, mutated(seed, random.Random(number).randrange))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            return type(error).__name__

    assert {outcome(number) for number in range(300)} >= {None, "JSONDecodeError", "KeyError", "UnicodeDecodeError"}


@pytest.mark.parametrize("message", ["short", "two\nlines of {}", "\x1b[31mred in {}" + " " * 20, "{}" + "x" * 3000])
def test_a_message_that_is_no_line_about_the_file_is_found_out(message, tmp_path):
    require_line(f"{tmp_path}: a good message; expected this", tmp_path)
    with pytest.raises(AssertionError):
        require_line(message.format(tmp_path), tmp_path)


def test_what_a_foreign_file_is_called_does_not_move_the_cursor(tmp_path):
    path = tmp_path / "a\nb\x1b[2J\u202e.json"
    with pytest.raises(
        ArtifactError, match=r"a\\nb\\x1b\[2J\\u202e\.json: no such file; expected a JSON object"
    ) as caught:
        atomic.read_json(path)
    assert str(caught.value).isprintable()


def test_a_long_message_keeps_its_beginning_and_its_end():
    message = str(ArtifactError("subject: " + "x" * 10_000 + "; expected this"))
    assert message.startswith("subject: x")
    assert message.endswith("x; expected this")
    assert len(message) < 2100
