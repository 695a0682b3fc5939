"""Where things lie: the checkout, its tests, its documentation, and the shared data beside it, which may be absent."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
DOCS = ROOT / "docs"
SHARED = ROOT.parent / "shared" / "data"
PLANTED = ROOT / "adaras_export" / "demo" / "planted_model"
