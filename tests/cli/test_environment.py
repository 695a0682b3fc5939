"""Which packages are here, which are missing, and how an optional library is told from a broken one."""

import re
import shlex
from importlib.metadata import PackageNotFoundError, requires, version

import pytest
from packaging.requirements import Requirement

from adaras_export import errors
from adaras_export.cli.environment import _EXTRAS, onnxruntime, packages
from adaras_export.errors import BrokenInstallationError, MissingExtraError, install_command, require
from adaras_export.exporters.onnx.builds import builds


def by_name(findings):
    return {finding.name: finding for finding in findings}


def asked_for(extra):
    lines = [Requirement(line) for line in requires("adaras-export")]
    return {one.name for one in lines if one.marker and one.marker.evaluate({"extra": extra})}


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
    assert "; for it, pip install 'onnx" in found["extra onnx"].text
    assert not builds(installed)


def test_a_core_library_that_is_missing_or_too_old_is_a_failure():
    for found, told in ((None, "missing"), ("4.56.2", "4.56.2")):
        line = by_name(packages(lambda name, found=found: found))["transformers"].line()
        assert line.startswith(f"FAIL transformers: {told}; expected <")
        assert ",>=4.57: pip install --upgrade 'transformers<" in line


def test_a_library_of_an_extra_that_is_too_old_is_a_failure():
    found = by_name(packages(lambda name: "0.17.1"))["extra peft"]
    line = r"FAIL extra peft: peft 0\.17\.1, expected <[\d.]+,>=0\.18; pip install 'peft<[\d.]+,>=0\.18' --upgrade"
    assert re.fullmatch(line, found.line())


def test_every_library_of_an_extra_is_one_that_the_extra_asks_for():
    for extra, names in _EXTRAS.items():
        assert {*names} <= asked_for(extra)


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
    assert re.search(r"run: pip install 'peft<[\d.]+,>=0\.18' --force-reinstall$", str(error.value))


def test_a_library_that_is_not_there_is_missing():
    with pytest.raises(MissingExtraError, match=r"not installed; run: pip install 'peft<[\d.]+,>=0\.18'$"):
        require("nothing_of_this_name.part", "peft", "target peft")


@pytest.mark.parametrize("extra", _EXTRAS)
def test_the_hint_for_an_extra_names_its_libraries_and_not_this_one_which_is_on_no_index(extra):
    words = shlex.split(install_command(extra))
    assert words[:2] == ["pip", "install"]
    assert {Requirement(one).name for one in words[2:]} == asked_for(extra)


def test_without_an_installation_the_hint_goes_by_the_source(monkeypatch):
    def absent(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(errors, "requires", absent)
    assert install_command("peft") == "pip install '.[peft]' in a clone of adaras-export"
