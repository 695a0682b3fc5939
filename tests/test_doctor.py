"""What `adaras-export doctor` says of an environment."""

import json
from importlib.metadata import version

import pytest

from adaras_export import cli, doctor


def by_name(findings):
    return {finding.name: finding for finding in findings}


def test_it_finds_what_is_installed_here():
    found = by_name(doctor.examine())
    assert found["torch"].text == version("torch")
    assert found["extra onnx"].ok
    assert "CPUExecutionProvider" in found["execution providers"].text
    assert not [finding for finding in found.values() if finding.ok is False]


def test_two_builds_of_onnx_runtime_are_a_failure_with_a_remedy():
    found = by_name(doctor.examine(lambda name: "1.0"))["one ONNX Runtime"]
    assert found.ok is False
    assert found.line() == (
        "FAIL one ONNX Runtime: onnxruntime 1.0 and onnxruntime-gpu 1.0 overwrite each other; "
        "pip uninstall both, then install one of them"
    )


def test_what_is_absent_comes_with_the_command_that_brings_it():
    found = by_name(doctor.examine(lambda name: None if "onnx" in name else "1.0"))
    assert found["extra onnx"].ok is None
    assert "pip install 'adaras-export[onnx]'" in found["extra onnx"].text
    assert found["execution providers"].text == "none without ONNX Runtime"


def test_the_command_prints_lines_or_json(capsys, monkeypatch):
    for arguments in ([], ["--json"]):
        monkeypatch.setattr("sys.argv", ["adaras-export", "doctor", *arguments])
        with pytest.raises(SystemExit) as status:
            cli.main()
        assert not status.value.code
    lines, _, record = capsys.readouterr().out.rpartition("\n{")
    assert f"ok   torch: {version('torch')}" in lines
    assert json.loads("{" + record)["ok"] is True


def test_the_command_fails_where_something_is_broken(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "examine", lambda: [doctor.Finding("one", ok=False, text="is two")])
    monkeypatch.setattr("sys.argv", ["adaras-export", "doctor"])
    with pytest.raises(SystemExit) as status:
        cli.main()
    assert status.value.code == 2
    assert "BrokenInstallationError: one: is two" in capsys.readouterr().err
