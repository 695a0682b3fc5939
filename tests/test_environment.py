"""Which packages are here, which are missing, and how an optional library is told from a broken one."""

from importlib.metadata import version

import pytest

from adaras_export.environment import has_onnxruntime, onnxruntime, packages
from adaras_export.errors import BrokenInstallationError, MissingExtraError, require


def by_name(findings):
    return {finding.name: finding for finding in findings}


def test_it_finds_what_is_installed_here():
    found = by_name(packages())
    assert found["torch"].text == version("torch")
    assert found["extra onnx"].ok
    assert not [finding for finding in found.values() if finding.ok is False]


def test_two_builds_of_onnx_runtime_are_a_failure_with_a_remedy():
    found = onnxruntime(lambda name: "1.0")
    assert found.ok is False
    assert found.line() == (
        "FAIL one ONNX Runtime: onnxruntime 1.0 and onnxruntime-gpu 1.0 overwrite each other; "
        "pip uninstall both, then install one of them"
    )


def test_what_is_absent_comes_with_the_command_that_brings_it():
    def installed(name):
        return None if "onnx" in name else "1.0"

    found = by_name(packages(installed))
    assert found["extra onnx"].ok is None
    assert "pip install 'adaras-export[onnx]'" in found["extra onnx"].text
    assert not has_onnxruntime(installed)


def test_a_core_library_that_is_missing_is_a_failure():
    assert by_name(packages(lambda name: None))["torch"].line() == "FAIL torch: missing"


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise ImportError('libnothing.so.1: cannot open shared object file')", "libnothing.so.1: cannot open"),
        ("import nothing_of_this_name", "No module named 'nothing_of_this_name'"),
    ],
)
def test_a_library_that_is_there_but_does_not_import_is_broken_and_not_missing(code, reason, tmp_path, monkeypatch):
    (tmp_path / "half_a_library.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(BrokenInstallationError, match="needs half_a_library, which is installed, but") as error:
        require("half_a_library", "peft", "target peft")
    assert reason in str(error.value)
    assert str(error.value).endswith("run: pip install 'adaras-export[peft]' --force-reinstall")


def test_a_library_that_is_not_there_is_missing():
    with pytest.raises(MissingExtraError, match=r"not installed; run: pip install 'adaras-export\[peft\]'$"):
        require("nothing_of_this_name.part", "peft", "target peft")
