"""What the code may import, and what it may never do."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import adaras_export
from adaras_export.exporters import TARGETS, load
from adaras_export.exporters.hf import payload
from adaras_export.models import FAMILIES

ROOT = Path(adaras_export.__file__).resolve().parents[1]
PACKAGE = sorted([*(ROOT / "adaras_export").rglob("*.py"), *(ROOT / "exporters").rglob("*.py")])
PAYLOAD = sorted((ROOT / "adaras_export" / "runtime").glob("*.py"))
each_file = pytest.mark.parametrize("path", PACKAGE, ids=lambda path: str(path.relative_to(ROOT)))


def imported(path):
    """Modules that a file imports, at its top or inside; relative ones keep their dot."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


def called(path):
    """Names of what a file calls: "eval", "torch.load"."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)


def run(*command):
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.skipif(not (ROOT / "pyproject.toml").exists(), reason="not a source checkout")
def test_each_layer_imports_only_what_stands_below_it():
    done = run(sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run()")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "module",
    [
        "adaras_export",
        "adaras_export.rule",
        "adaras_export.statistics",
        "adaras_export.exporters",
        "adaras_export.onnx_runner",
    ],
)
def test_values_are_imported_without_torch_or_transformers(module):
    heavy = "{'torch', 'transformers', 'sklearn', 'huggingface_hub'}"
    done = run(sys.executable, "-c", f"import sys, {module}; print(*sorted({heavy} & {{*sys.modules}}))")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_every_public_name_is_there():
    for name in adaras_export.__all__:
        assert getattr(adaras_export, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        adaras_export.nothing  # noqa: B018


@pytest.mark.parametrize("path", PAYLOAD, ids=lambda path: path.name)
def test_the_payload_imports_torch_transformers_siblings_and_a_little_of_the_standard_library(path):
    allowed = {"torch", "transformers", "threading", "collections", "contextlib", "functools", "typing"}
    if path.name == "thin_adaras.py":  # safetensors, on which Transformers depends, maps the files that it checks
        allowed |= {"safetensors", "hashlib", "json", "copy", "sys"}
    for module in imported(path):
        if module.startswith("."):
            assert module == ".steering_adaras"  # flat: Transformers does not fetch nested files
        else:
            assert module.partition(".")[0] in allowed


def test_the_payload_is_short_enough_to_be_read():
    """What people trust with trust_remote_code must be readable in one sitting."""
    for path in PAYLOAD:
        limit = 60 if path.name.startswith("modeling_") else 640
        assert len(path.read_text().splitlines()) < limit, path.name


@pytest.mark.parametrize("path", PAYLOAD, ids=lambda path: path.name)
def test_the_payload_opens_no_file_starts_no_process_and_uses_no_network(path):
    names = {*called(path)}
    assert not names & {"open", "exec", "eval", "compile", "__import__"}
    assert not {name for name in names if name.startswith(("os.", "subprocess.", "socket.", "torch.hub", "torch.load"))}


@each_file
def test_nothing_runs_code_from_data(path):
    names = {*called(path)}
    forbidden = {"eval", "exec", "compile", "__import__", "torch.load", "pickle.load", "pickle.loads", "joblib.load"}
    assert not names & forbidden
    assert not {
        module for module in imported(path) if module.partition(".")[0] in {"pickle", "dill", "joblib", "marshal"}
    }


@each_file
def test_only_code_that_opens_exports_trusts_them(path):
    """The exporter does so behind `inspect`, which found the code to be the library's own."""
    keywords = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.keyword)]
    trusting = [k for k in keywords if k.arg == "trust_remote_code" and ast.unparse(k.value) != "False"]
    assert not trusting or path.name in {"hf.py", "clean_process.py"}


def test_the_oracle_imports_nothing_of_the_library():
    assert {*imported(ROOT / "tests" / "oracle.py")} == {"math", "torch"}


def test_what_runs_in_the_clean_process_imports_nothing_of_the_library():
    script = ROOT / "tests" / "exporters" / "clean_process.py"
    assert {*imported(script)} == {"json", "sys", "torch", "transformers", "peft", "adaras_export"}
    assert 'sys.modules["adaras_export"] = None' in script.read_text()


def test_families_and_payload_files_match():
    files = {path.name for path in PAYLOAD if path.name.startswith("modeling_")}
    assert {family.payload for family in FAMILIES.values()} == files
    for name, family in FAMILIES.items():
        assert family.model_type == name
        assert set(payload(name)) == {"steering_adaras.py", family.payload}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_payload_file_defines_the_classes_of_its_family(family):
    tree = ast.parse(payload(family)[FAMILIES[family].payload])
    classes = {node.name: ast.unparse(node) for node in tree.body if isinstance(node, ast.ClassDef)}
    stem = next(name for name in classes if name.endswith("Config")).removesuffix("Config")
    assert {f"{stem}Config", f"{stem}Model", f"{stem}ForCausalLM"} < set(classes)
    assert f"model_type = 'adaras_{family}'" in classes[f"{stem}Config"]


def test_every_target_loads_under_its_own_name():
    for target in TARGETS:
        exporter = load(target)
        assert exporter.name == target
        assert exporter.drops <= {"gate", "start", "dial"}
        assert "{repo}" in exporter.usage()
