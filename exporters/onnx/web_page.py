"""The web page of target `onnx`: files of ours, libraries from npm, and a graph whose dials JavaScript can feed.

Knows nothing of rules: what it shows, it reads from the artifact. The libraries are taken from the user's npm, in
exact versions whose content is known here; no code of theirs runs.
"""

import base64
import hashlib
import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import onnx

from adaras_export.errors import ExportError
from adaras_export.exporters.onnx.session import STRENGTH, THRESHOLD

GRAPH = "onnx/model_dial.onnx"
_OWN = ("index.html", "app.js", "worker.js", "style.css", "vendor/NOTICE.txt")


@dataclass(frozen=True)
class _Package:
    """A package of npm: its SHA-512 as lock files have it, and which of its files go where in the page."""

    name: str
    version: str
    sha512: str
    files: dict[str, str]


_PACKAGES = (
    _Package(
        "@huggingface/transformers",
        "4.3.1",
        "5+voSeUCFK6PCKlY15dPhNOKq3/zOTxDN7oC+Wy9dFb1QZ0TSQomZRRy7URRK8YRuUoE9fGMQTTPC5d/pWBJhA==",
        {"dist/transformers.min.js": "vendor/transformers.min.js", "LICENSE": "vendor/LICENSE"},
    ),
    _Package(
        "onnxruntime-web",  # the version that the other one was built with
        "1.31.0-dev.20260914-8d85527a0",
        "Iy7rtadoBgxS/LLvDr3QW38DB1PNXRnr0GJMcL0TAt7c9qjgVQl83UlGCVyeAnK2InpmW8Uc3PL8XIuqtDeF6g==",
        {
            f"dist/ort-wasm-simd-threaded.{suffix}": f"vendor/ort-wasm-simd-threaded.{suffix}"
            for suffix in ("mjs", "wasm")
        },
    ),
)

FILES = frozenset({GRAPH, *_OWN, *(name for package in _PACKAGES for name in package.files.values())})
"""All that a page consists of."""


def write_files(out: Path) -> None:
    """Write all of the page but its graph into ``out``.

    Raises:
        ExportError: npm is absent, finds no such package, or gives another content than the known one.
    """
    for name, content in _own().items():
        target = out / name
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(content)
    with tempfile.TemporaryDirectory() as folder:
        for package in _PACKAGES:
            _unpack(package, _fetched(package, Path(folder)), out)


def write_graph(graph: Path, out: Path) -> None:
    """Write ``graph`` once more, as `GRAPH` below ``out``: its dials are inputs that have to be fed."""
    (out / GRAPH).write_bytes(_dial_graph(graph))


def differing(graph: Path, folder: Path) -> list[str]:
    """Names of the page's files that are not as `write_files` and `write_graph` write them; not of the libraries."""
    expected = {**_own(), GRAPH: _dial_graph(graph)}
    return [
        name
        for name, content in expected.items()
        if not (folder / name).is_file() or (folder / name).read_bytes() != content
    ]


def _own() -> dict[str, bytes]:
    files = resources.files("adaras_export.exporters.onnx") / "page"
    return {name: files.joinpath(*name.split("/")).read_bytes() for name in _OWN}


def _dial_graph(graph: Path) -> bytes:
    model = onnx.load(graph, load_external_data=False)
    fixed = [one for one in model.graph.initializer if one.name not in (STRENGTH, THRESHOLD)]
    del model.graph.initializer[:]
    model.graph.initializer.extend(fixed)
    return bytes(model.SerializeToString(deterministic=True))


def _fetched(package: _Package, folder: Path) -> Path:
    """The package as npm packs it."""
    npm = shutil.which("npm")
    if npm is None:
        raise ExportError(
            "page: npm is not installed; the page's libraries come from it: install Node.js, or leave out --page"
        )
    wanted = f"{package.name}@{package.version}"
    done = subprocess.run(
        [npm, "pack", "--silent", "--ignore-scripts", wanted], cwd=folder, capture_output=True, text=True, check=False
    )
    path = folder / (done.stdout.split() or [""])[-1]
    if done.returncode != 0 or not path.is_file():
        reason = " ".join(done.stderr.split()) or f"exit status {done.returncode}"
        raise ExportError(f"page: npm pack {wanted} failed ({reason}); expected a registry that has it: npm ping")
    return path


def _unpack(package: _Package, path: Path, out: Path) -> None:
    found = base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    if found != package.sha512:
        raise ExportError(
            f"page: {package.name}@{package.version} has SHA-512 {found}; expected {package.sha512}; the registry that "
            "npm is set up for gives another file: npm config get registry"
        )
    with tarfile.open(path) as archive:
        for member, name in package.files.items():
            source = archive.extractfile(f"package/{member}")
            assert source is not None  # the content is known
            (out / name).write_bytes(source.read())
