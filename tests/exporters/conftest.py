"""Exports that several test files open."""

import pytest

from adaras_export.exporters.hf import EXPORTER


@pytest.fixture(scope="session")
def written(rules, folders, tmp_path_factory):
    """The folder of an export to `hf`, by the keys of ``rules``."""

    class Written(dict):
        def __missing__(self, key):
            self[key] = tmp_path_factory.mktemp("export") / "-".join(map(str, key))
            self[key].mkdir()
            EXPORTER.write(rules[key], folders[key[0]], self[key])
            return self[key]

    return Written()
