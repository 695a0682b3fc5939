"""The commands of docs/report.md, followed as they stand there."""

import json
import re
import shlex
from pathlib import Path

import evaluations
import pytest
from places import DOCS

from adaras_export import cli

pytest.importorskip("scipy")
pytest.importorskip("matplotlib")

PAGE = (DOCS / "report.md").read_text()
[BLOCK] = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
FILES = {
    "evaluation.json": evaluations.GAIN,
    "tuned.json": evaluations.TUNED,
    "gate.json": evaluations.GATE,
    "first-a.json": evaluations.SAMPLED,
    "first-b.json": evaluations.GAIN,
    "second-b.json": {**evaluations.NULL, "rule": evaluations.OTHER},
}


@pytest.mark.parametrize("command", BLOCK.splitlines())
def test_a_command_of_the_page_writes_what_it_names(command, tmp_path, monkeypatch, capsys):
    for name, record in FILES.items():
        (tmp_path / name).write_text(json.dumps(record))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", shlex.split(command))
    with pytest.raises(SystemExit) as status:
        cli.main()
    assert not status.value.code
    assert Path(shlex.split(command)[-1]).stat().st_size > 1000
    assert "steering helps" in capsys.readouterr().out
