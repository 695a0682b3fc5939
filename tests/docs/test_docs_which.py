"""docs/which.md against the exporters: what its rows promise, lose and cite."""

import re

import pytest
from places import ROOT

from adaras_export.core.families import FAMILIES
from adaras_export.errors import ExportError
from adaras_export.exporters import TARGETS, load
from adaras_export.exporters.base import ExportContext
from adaras_export.exporters.gguf.exporter import _ARCHITECTURES
from adaras_export.exporters.gguf.model import CARRIERS
from adaras_export.exporters.gguf.switchable import WRITTEN_AS
from adaras_export.exporters.stock.constant_neuron import wider
from adaras_export.exporters.stock.families import FORMS

PAGE = (ROOT / "docs" / "which.md").read_text()
LOSS = "--accept-loss gate,start"


def rows(heading):
    """The cells of the table below a heading, a list a row."""
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


SERVED = [*rows("The whole rule"), *rows("Without a gate")]
COMMANDS = [(row, match[1]) for row in SERVED if (match := re.match(r"`R ([^`]*)`", row[1]))]
FAMILY_ROWS = {row[0]: row[1:] for row in rows("Families")}
each_command = pytest.mark.parametrize(("row", "command"), COMMANDS, ids=[row[0] for row, _ in COMMANDS])


def chosen(command, tmp_path):
    """The exporter of a command, and the features that it accepts to lose."""
    words = command.replace("LOSS", LOSS).split()
    options = {word.removeprefix("--").replace("-", "_") for word in words if word.startswith("--")}
    options -= {"to", "accept_loss"}
    (tmp_path / "MODEL.gguf").touch()
    given = {"into": tmp_path / "MODEL.gguf", "start_at": "TEXT"}
    values = {name: given.get(name, True) for name in options}
    accepted = set(words[words.index("--accept-loss") + 1].split(",")) if "--accept-loss" in words else set()
    exporter = load(words[words.index("--to") + 1])
    assert options <= exporter.spec.options
    return exporter.with_context(ExportContext("base", options=values)), accepted


@each_command
def test_a_command_accepts_what_its_target_drops_and_the_row_says_so(row, command, tmp_path):
    exporter, accepted = chosen(command, tmp_path)
    assert accepted == exporter.spec.drops
    told = set() if row[3] == "nothing" else set(row[3].split(", "))
    assert told == exporter.spec.drops


def test_the_page_has_every_target():
    assert {re.search(r"--to (\S+)", command)[1] for _, command in COMMANDS} == TARGETS.keys()


@pytest.mark.parametrize("row", SERVED, ids=[row[0] for row in SERVED])
def test_what_a_row_cites_is_there(row):
    cited = re.findall(r"`(tests/[^`]*)`|\]\(([^)]*)\)|`make ([^`]*)`", row[-1])
    assert cited
    for test, page, target in cited:
        assert not test or (ROOT / test).exists()
        assert not page or (ROOT / "docs" / page).exists()
        assert not target or f"\n{target}: " in (ROOT / "Makefile").read_text()


# tests/exporters/test_families.py shows them refused.
STATEFUL = ("qwen3_5_text", "gemma4_text", "lfm2", "lfm3", "falcon_h1", "granitemoehybrid")


def test_the_families_are_those_of_the_exporters():
    assert FAMILY_ROWS.keys() == {name for name, family in FAMILIES.items() if not family.images}
    reading = re.search(r"Models that read images: (.*)\.", PAGE)[1].split(", ")
    assert {*reading} == {name for name, family in FAMILIES.items() if family.images}
    assert "of the first twelve" in PAGE
    assert [*FAMILIES][:12] == [name for name, family in FAMILIES.items() if family.vllm]
    assert {*[*FAMILY_ROWS][:12]} == {*[*FAMILIES][:12]}
    for family, (whole, stock, _, gguf) in FAMILY_ROWS.items():
        assert whole == ("yes, not onnx" if family in STATEFUL else "yes")
        assert ("a norm follows" in gguf) is (FAMILIES[family].behind == "norm")
        assert stock.startswith("no") is (family not in FORMS)
        assert gguf.startswith("yes") is (family in _ARCHITECTURES)
        assert ("--into" in gguf) is (_ARCHITECTURES.get(family) in CARRIERS)
        assert ("--switchable" in gguf) is (_ARCHITECTURES.get(family) in WRITTEN_AS)


@pytest.mark.parametrize("family", FORMS)
def test_a_family_is_switchable_where_the_page_says_so(family):
    config = {"hidden_act": "silu", "intermediate_size": 48}
    if FAMILY_ROWS[family][2].startswith("yes"):
        assert wider(config, FORMS[family], "base")
        return
    with pytest.raises(ExportError, match="no gated MLP"):
        wider(config, FORMS[family], "base")
