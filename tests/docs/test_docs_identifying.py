"""The commands of docs/identifying.md: the cheap ones run, all of them have options that exist."""

import re
import shlex
from pathlib import Path

import pytest
import tiny
import typer
from places import DOCS

from adaras_export import cli
from adaras_export.core.trace_files import write_traces
from adaras_export.core.traces import Trace

PAGE = (DOCS / "identifying.md").read_text()
COMMANDS = [
    shlex.split(line)
    for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    if "adaras" in line and not line.startswith("pip")
]


def ours(words):
    """What follows the name of the program."""
    name = "adaras-export" if "adaras-export" in words else "adaras_export"
    return words[words.index(name) + 1 :]


def test_every_command_of_the_page_has_options_that_exist(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    program = typer.main.get_command(cli.app)
    assert len(COMMANDS) == 7
    for words in COMMANDS:
        name, *given = [re.sub(r"\$SLURM_ARRAY_TASK_ID", "1", word) for word in ours(words)]
        for word in given:
            if word.endswith((".jsonl", ".safetensors")):
                Path(word).touch()  # what is read must be there
        context = program.commands[name].make_context(name, given)
        assert str(context.params["out"]).endswith(".safetensors")


def test_the_options_of_the_table_exist(capsys):
    help_ = " ".join(name for p in typer.main.get_command(cli.app).commands["identify"].params for name in p.opts)
    for option in re.findall(r"^\| `(--[a-z-]+)", PAGE, re.MULTILINE):
        assert option in help_.split()


def test_the_array_and_the_merge_give_the_file_of_one_process(tmp_path, folders, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "MODEL").symlink_to(folders["llama"])
    texts = [(f"{n}+1=", text, text == str(n + 1)) for n in range(8) for text in (str(n + 1), "hm", "0!")]
    write_traces("traces.jsonl", [Trace(str(n), row[0], *row) for n, row in enumerate(texts)])
    array = next(words for words in COMMANDS if "--shard" in words)
    merge = next(words for words in COMMANDS if "merge" in words)
    plain = COMMANDS[0]
    for index in range(4):
        run([re.sub(r"\$SLURM_ARRAY_TASK_ID", str(index), word) for word in array], monkeypatch)
    parts = [str(path) for path in sorted(Path().glob("part*.safetensors"))]
    limit = ["--keep", "40"]  # the page's 200 are more than the tiny model has
    run([*merge[:2], *parts, *merge[3:], *limit], monkeypatch)
    merged = Path("neurons.safetensors").read_bytes()
    run([*plain, *limit], monkeypatch)
    assert Path("neurons.safetensors").read_bytes() == merged
    assert tiny.LAYERS * tiny.MLP_SIZE // 2 < 200


def run(words, monkeypatch):
    monkeypatch.setattr("sys.argv", [str(word) for word in words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
