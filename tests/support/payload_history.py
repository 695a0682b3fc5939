"""Records the payload of today in exporters/payload_history.json; to be run when it has changed.

python tests/support/payload_history.py ["what exports made before lack"]
"""

import hashlib
import json
import sys

from places import ROOT

PACKAGE = ROOT / "adaras_export"
HISTORY = ROOT / "exporters" / "payload_history.json"


def payload():
    """SHA-256 of each file that exports carry today, by name."""
    files = sorted((PACKAGE / "runtime").glob("*_adaras*.py"))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def recorded(history, fix=None):
    """The history with the payload of today, which has ``fix`` besides those before."""
    fixes = [*history["fixes"], *([fix] if fix else [])]
    files = {name: dict(found) for name, found in history["files"].items()}
    for name, digest in payload().items():
        if digest not in files.setdefault(name, {}):
            files[name][digest] = len(fixes)
    return {"fixes": fixes, "files": files}


if __name__ == "__main__":
    changed = recorded(json.loads(HISTORY.read_text()), *sys.argv[1:])
    HISTORY.write_text(json.dumps(changed, indent=1, sort_keys=True) + "\n")
