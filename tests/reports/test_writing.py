"""Whole reports: complete ones are in tests/golden/reports; the same files give the same bytes."""

import json
from pathlib import Path

import evaluations
import pytest

from adaras_export.errors import ArtifactError
from adaras_export.reports.writing import report_of, require_format, write

GOLDEN = Path(__file__).parent.parent / "golden" / "reports"
PAGES = ("gain", "hostile", "transfer")  # one style for all; the other cases differ in words
TEXTS = [
    (name, suffix) for name in evaluations.CASES for suffix in (".md", ".html") if suffix == ".md" or name in PAGES
]
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
    return {name: report_of(files_of(name, tmp_path_factory.mktemp(name))) for name in evaluations.CASES}


@pytest.mark.parametrize(("name", "suffix"), TEXTS)
def test_a_report_is_the_golden_one(name, suffix, made, tmp_path, pytestconfig):
    """`pytest tests/reports --update-golden` writes them anew; read the difference before it is committed."""
    write(made[name], tmp_path / f"report{suffix}")
    found, golden = (tmp_path / f"report{suffix}").read_bytes(), GOLDEN / f"{name}{suffix}"
    if pytestconfig.option.update_golden:
        GOLDEN.mkdir(parents=True, exist_ok=True)
        golden.write_bytes(found)
    assert found == golden.read_bytes()


def test_every_golden_report_is_of_a_case():
    assert {(path.stem, path.suffix) for path in GOLDEN.iterdir()} == {*TEXTS}


def test_the_same_files_give_the_same_data(made, tmp_path):
    again = report_of(files_of("transfer", tmp_path))
    assert again == made["transfer"]
    write(again, tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(json.dumps(again.record))


@each_case
def test_the_data_have_the_sentence_that_the_texts_have(name, made, tmp_path):
    write(made[name], tmp_path / "report.md")
    text = (tmp_path / "report.md").read_text().replace("\\", "")
    for evaluation in made[name].record["evaluations"]:
        assert evaluation["sentence"] in text
        assert "believe me" not in text


def test_the_page_of_a_thousand_questions_is_small(tmp_path):
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
