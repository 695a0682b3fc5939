"""Whole reports: complete ones are in tests/golden/reports; the same files give the same bytes."""

import json
from pathlib import Path

import evaluations
import pytest
from places import TESTS

from adaras_export.errors import ArtifactError
from adaras_export.evaluation.report.render import report_of, require_format, write

GOLDEN = TESTS / "golden" / "reports"
each_case = pytest.mark.parametrize("name", evaluations.CASES)


def files_of(name, folder):
    """The files that a case is made of."""
    paths = [folder / file for file in evaluations.CASES[name]]
    for path, record in zip(paths, evaluations.CASES[name].values(), strict=True):
        path.write_text(json.dumps(record))
    return paths


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The report of every case."""
    pytest.importorskip("scipy")
    pytest.importorskip("matplotlib")
    return {name: report_of(files_of(name, tmp_path_factory.mktemp(name))) for name in evaluations.CASES}


@pytest.mark.parametrize("name", evaluations.GOLDEN)
def test_a_report_is_the_golden_one(name, made, pytestconfig):
    """`pytest tests/evaluation/report --update-golden` writes them anew; read the difference before it is committed."""
    text, golden = made[name].markdown(), GOLDEN / f"{name}.md"
    if pytestconfig.option.update_golden:
        golden.write_text(text)
    assert text == golden.read_text()


def test_every_golden_report_is_of_a_case():
    assert {path.name for path in GOLDEN.iterdir()} == {f"{name}.md" for name in evaluations.GOLDEN}


@pytest.mark.parametrize("suffix", [".html", ".json"])
def test_the_same_files_give_the_same_bytes(suffix, made, tmp_path):
    again, paths = report_of(files_of("few-draws", tmp_path)), [tmp_path / f"{name}{suffix}" for name in ("a", "b")]
    for report, path in zip((made["few-draws"], again), paths, strict=True):
        write(report, path)
    assert paths[0].read_bytes() == paths[1].read_bytes()


@each_case
def test_the_data_have_the_sentence_that_the_text_has(name, made):
    text = made[name].markdown().replace("\\", "")
    for evaluation in made[name].as_record()["evaluations"]:
        assert evaluation["sentence"] in text
        assert "believe me" not in text


def test_the_page_of_a_thousand_questions_is_small(tmp_path):
    pytest.importorskip("matplotlib")
    record = evaluations.record(evaluations.verdicts(evaluations.shares(), questions=1000))
    (tmp_path / "e.json").write_text(json.dumps(record))
    write(report_of([tmp_path / "e.json"]), tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size < 60_000


def test_a_report_needs_an_evaluation(tmp_path):
    (tmp_path / "tuned.json").write_text(json.dumps(evaluations.TUNED))
    with pytest.raises(ArtifactError, match=r"tuned.json: no evaluation; expected a file of adaras-export eval"):
        report_of([tmp_path / "tuned.json"])


def test_one_rule_on_one_set_of_questions_is_told_once(tmp_path):
    paths = [tmp_path / name for name in ("a.json", "b.json")]
    for path in paths:
        path.write_text(json.dumps(evaluations.GAIN))
    with pytest.raises(ArtifactError, match=r"b.json: evaluates the rule of a.json on the same questions"):
        report_of(paths)


def test_a_name_without_a_format_is_refused():
    require_format(Path("report.md"))
    with pytest.raises(ArtifactError, match=r"report.pdf: names no format .* ends with .html, .md, .json"):
        require_format(Path("report.pdf"))
