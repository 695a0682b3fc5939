"""Coverage-guided fuzzing of every reader with atheris, run by hand: `make fuzz`; docs/reliability.md has the last log.

    python tests/system/fuzz/atheris_readers.py CORPUS [--reader NAME] [options of libFuzzer]

The first byte of an input chooses the reader, the rest is its file. Stops at the first input that gives anything else
than a value or one printable line. Our own modules are instrumented, those of libraries are not. Not run by pytest.
"""

import hashlib
import logging
import random
import sys
import tempfile
import warnings
from pathlib import Path

import atheris

sys.path[:0] = [str(Path(__file__).resolve().parents[up]) for up in (0, 1, 3)] + [
    str(Path(__file__).resolve().parents[2] / "support")
]
with atheris.instrument_imports(include=["adaras_export"]):
    from fuzz import mutations, readers

_NAMES = [*readers.READERS]
_MEMORY = Path("/dev/shm")  # a file for every input: on a disk they would take most of the time


def _main() -> None:
    logging.disable()  # what libraries say of an odd graph would bury the log
    warnings.simplefilter("ignore")
    arguments = sys.argv
    only = _taken(arguments, "--reader")
    corpus = Path(arguments[1])
    with tempfile.TemporaryDirectory(dir=_MEMORY if _MEMORY.is_dir() else None) as scratch:
        folders = {
            name: readers.prepared(reader, Path(scratch, f"folder{at}"))
            for at, (name, reader) in enumerate(readers.READERS.items())
        }
        _write_seeds(corpus, only)
        dictionary = Path(scratch, "dictionary")
        dictionary.write_text("".join(f'"{_escaped(word)}"\n' for word in _words()))

        def one_input(content: bytes) -> None:
            name = only or (_NAMES[content[0] % len(_NAMES)] if content else _NAMES[0])
            readers.verdict(readers.READERS[name], folders[name], content[1:])

        options = [f"-dict={dictionary}", f"-artifact_prefix={corpus.parent}/crash-", *arguments[1:]]
        atheris.Setup([arguments[0], *options], one_input, custom_mutator=_mutated)
        atheris.Fuzz()


def _taken(arguments: list[str], option: str) -> str | None:
    if option not in arguments:
        return None
    at = arguments.index(option)
    _, value = arguments.pop(at), arguments.pop(at)
    return value


def _mutated(content: bytes, largest: int, seed: int) -> bytes:
    """Half of the time libFuzzer's own damage, else one that knows JSON and safetensors; the reader stays the same."""
    draw = random.Random(seed)
    if not content or draw.random() < 0.5:
        return atheris.Mutate(content, largest)
    return (content[:1] + mutations.mutated(content[1:], draw.randrange))[:largest]


def _write_seeds(corpus: Path, only: str | None) -> None:
    corpus.mkdir(parents=True, exist_ok=True)
    for at, (name, reader) in enumerate(readers.READERS.items()):
        for seed in reader.seeds() if only in (None, name) else ():
            content = bytes([at]) + seed
            (corpus / hashlib.sha1(content).hexdigest()).write_bytes(content)


def _words() -> list[bytes]:
    keys = {
        *("__metadata__", "adaras", "dtype", "shape", "data_offsets", "F32", "I64", "BF16", "kind", "version", "base"),
        *("weight_map", "model_type", "id", "question_id", "prompt", "completion", "correct", "is_good", "answer"),
        *(
            "eos_token_id",
            "chat_template",
            "content",
            "GGUF",
            "general.alignment",
            "overall_neuron_index",
            ".safetensors",
        ),
    }
    return sorted({*(key.encode() for key in keys), *(raw for raw in mutations.RAW if len(raw) < 60)})


def _escaped(word: bytes) -> str:
    return "".join(f"\\x{one:02x}" for one in word)


if __name__ == "__main__":
    _main()
