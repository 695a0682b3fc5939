"""The web page's parts: what npm gives is known by its content, and the dialled graph is the same graph."""

import re
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest

from adaras_export.core.checkpoint import Checkpoint
from adaras_export.errors import ExportError
from adaras_export.exporters.onnx import web_page
from adaras_export.exporters.onnx.exporter import EXPORTER

pytestmark = pytest.mark.onnx


@pytest.fixture
def npm(tmp_path, monkeypatch):
    """``npm(script)`` puts a program of that name in the only folder of the path."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))

    def write(script):
        program = folder / "npm"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)

    return write


def test_without_npm_a_page_is_refused_before_the_long_work(npm, rules, folders, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(ExportError, match=r"page: npm is not installed; .*: install Node\.js, or leave out --page"):
        replace(EXPORTER, page=True).write(rules["llama", None, "last_prompt_token"], Checkpoint(folders["llama"]), out)
    assert not (out / "onnx").exists()


def test_what_npm_complains_of_is_passed_on_in_one_line(npm, tmp_path):
    npm("echo 'npm error code E404' >&2; echo 'npm error not found' >&2; exit 1")
    message = r"npm pack @huggingface/transformers@[\d.]+ failed \(npm error code E404 npm error not found\); expected"
    with pytest.raises(ExportError, match=message):
        web_page.write_files(tmp_path)


@pytest.mark.parametrize("script", ["exit 3", "echo absent.tgz; exit 3"])
def test_an_npm_that_says_nothing_is_refused_by_its_status(script, npm, tmp_path):
    npm(script)
    with pytest.raises(ExportError, match=r"failed \(exit status 3\)"):
        web_page.write_files(tmp_path)


def test_a_package_with_other_content_is_refused_before_it_is_opened(npm, tmp_path):
    npm("echo other > package.tgz; echo package.tgz")
    with pytest.raises(ExportError, match=r"has SHA-512 .*; expected 5\+voSeUC.*: npm config get registry"):
        web_page.write_files(tmp_path)
    assert not (tmp_path / "vendor" / "transformers.min.js").exists()


def test_the_page_names_no_other_server():
    for name, content in web_page._own().items():
        text = content.decode().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?:|//[a-z]+\.", text), name


@pytest.fixture
def graph(tmp_path):
    """x + strength * threshold, with one more initialiser that nobody may feed."""
    text = """
    <ir_version: 10, opset_import: ["" : 23]>
    dialled (float[n] x, float steering_strength, float steering_threshold) => (float[n] y)
    <float steering_strength = {2.0}, float steering_threshold = {0.5}, float one = {1.0}>
    {
        both = Mul (steering_strength, steering_threshold)
        same = Mul (both, one)
        y = Add (x, same)
    }
    """
    (tmp_path / "onnx").mkdir()
    path = tmp_path / "onnx" / "model.onnx"
    onnx.save(onnx.parser.parse_model(text), path)
    return path


def test_the_dials_are_inputs_that_have_to_be_fed(graph, tmp_path):
    web_page.write_graph(graph, tmp_path)
    path = tmp_path / web_page.GRAPH
    onnx.checker.check_model(path, full_check=True)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [one.name for one in session.get_inputs()] == ["x", "steering_strength", "steering_threshold"]
    assert not session.get_overridable_initializers()
    one = np.float32(1)
    fed = {"x": np.ones(2, np.float32), "steering_strength": 4 * one, "steering_threshold": 3 * one}
    assert session.run(None, {name: np.asarray(value) for name, value in fed.items()})[0].tolist() == [13, 13]


def test_a_page_that_was_changed_is_named(graph, tmp_path):
    for name, content in web_page._own().items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    web_page.write_graph(graph, tmp_path)
    assert web_page.differing(graph, tmp_path) == []
    (tmp_path / "app.js").unlink()
    (tmp_path / "vendor" / "NOTICE.txt").write_text("")
    (tmp_path / web_page.GRAPH).write_bytes(graph.read_bytes())
    assert web_page.differing(graph, tmp_path) == ["app.js", "vendor/NOTICE.txt", web_page.GRAPH]
