"""Exports to target `onnx`, and what each runtime makes of them."""

from dataclasses import replace

import drive
import pytest
import tiny

from adaras_export.core.checkpoint import Checkpoint


@pytest.fixture(scope="session")
def artifacts(rules, folders, tmp_path_factory):
    """The folder of an export, by (*key of ``rules``, flavour): words of "genai inline int4 int8 fp16 negated"."""

    def write(key):
        from adaras_export.exporters.onnx.exporter import EXPORTER, PRECISIONS

        *rule, flavour = key
        folder = tmp_path_factory.mktemp("onnx") / "-".join(map(str, rule))
        if flavour.endswith("negated"):
            return drive.negated(found[(*rule, flavour.removesuffix("negated").strip())], folder)
        folder.mkdir()
        options = [("precision", word) if word in PRECISIONS else (word, True) for word in flavour.split()]
        replace(EXPORTER, **dict(options)).write(rules[tuple(rule)], Checkpoint(folders[rule[0]]), folder)
        return folder

    found = tiny.Lazy(write)
    return found


@pytest.fixture(scope="session")
def driven(artifacts, tmp_path_factory, pytestconfig):
    """``driven(runtime, {key: modes or a dict with them})``: what its driver found, by key of ``artifacts``."""

    def run(runtime, wanted):
        drive.require_built(runtime, required=pytestconfig.option.require_runtimes)
        jobs = {key: drive.job(artifacts[key], key, **how) for key, how in wanted.items()}
        return drive.run_driver(runtime, jobs, tmp_path_factory.mktemp(runtime))

    return run
