"""What works here: libraries, a GPU, the Hub, and every target, tried. Installs and changes nothing."""

import os
import platform
import shutil
from collections.abc import Callable

from adaras_export.cli import self_test
from adaras_export.cli.environment import Finding, packages
from adaras_export.cli.options import Json, progress, show
from adaras_export.errors import BrokenInstallationError, first_line
from adaras_export.exporters.onnx.builds import builds
from adaras_export.files.hub import http_error, without_password

_HUB = "hub access"
_SECONDS = 5  # for the Hub to answer


def doctor(as_json: Json = False) -> None:
    """Say what works here: libraries, a GPU, the Hub, and every target, tried on a toy. Takes half a minute."""
    with progress() as bar:
        findings = examine(bar("trying targets"))
    broken = [finding for finding in findings if finding.ok is False]
    record = {"ok": not broken, "findings": [vars(finding) for finding in findings]}
    show(record, "\n".join(finding.line() for finding in findings), as_json)
    if broken:
        raise BrokenInstallationError("; ".join(f"{finding.name}: {finding.text}" for finding in broken))


def examine(progress: Callable[[int, int], None] | None = None) -> list[Finding]:
    """Look at this environment; ``progress`` is called with how many targets were tried, and of how many."""
    here = [_python(), *packages(), _looked("execution providers", _providers), _looked("GPU", _gpu)]
    return [*here, hub_access(), _npm(), *self_test.try_all(progress=progress)]


def hub_access() -> Finding:
    """Whether the Hub answers, and whom it takes the user's token for; the token is shown to nobody else."""
    from huggingface_hub import constants, get_token

    endpoint = without_password(constants.ENDPOINT)
    if constants.HF_HUB_OFFLINE:
        return Finding(_HUB, None, f"offline mode; models come from folders and from {constants.HF_HUB_CACHE}")
    token = get_token()
    status, user = _asked(constants.ENDPOINT, token)
    figures = {"endpoint": endpoint, "status": status, "user": user}
    if status == 200 and user is not None:
        return Finding(_HUB, ok=True, text=f"{endpoint}, logged in as {user}", figures=figures)
    if status == 401 and token is None:
        text = "answers; not logged in, which only push and private models need: hf auth login"
        return Finding(_HUB, ok=True, text=f"{endpoint} {text}", figures=figures)
    if status == 401:
        mend = "set another HF_TOKEN" if os.environ.get("HF_TOKEN") else "run: hf auth login --force"
        return Finding(_HUB, ok=False, text=f"{endpoint} refuses the token that it is given; {mend}", figures=figures)
    how = (
        f"answers with status {status}, not as a Hub does" if isinstance(status, int) else f"cannot be asked ({status})"
    )
    return Finding(_HUB, None, f"{endpoint} {how}; only models of the Hub need it", figures)


def _asked(endpoint: str, token: str | None) -> tuple[int | str, str | None]:
    """The status of the Hub's answer to who is asking, or what came instead of one, and the user's name."""
    from huggingface_hub.utils import build_hf_headers, get_session  # type: ignore[attr-defined]

    try:
        headers = build_hf_headers(token=token or False)
        answer = get_session().get(f"{endpoint}/api/whoami-v2", headers=headers, timeout=_SECONDS)
        told = answer.json() if answer.status_code == 200 else None
    except (http_error(), OSError, ValueError) as error:
        return type(error).__name__, None  # its message may quote the token
    name = told.get("name") if isinstance(told, dict) else None
    return answer.status_code, name if isinstance(name, str) else None


def _python() -> Finding:
    system = f"{platform.system()} {platform.machine()}"
    return Finding("Python", ok=True, text=f"{platform.python_version()}, {system}, {os.cpu_count()} processors")


def _looked(name: str, look: Callable[[], Finding]) -> Finding:
    """What ``look`` finds, or why a library that it imports does not open."""
    try:
        return look()
    except (ImportError, OSError) as error:
        return Finding(name, ok=False, text=f"{type(error).__name__}: {first_line(error)}")


def _providers() -> Finding:
    if not builds():
        return Finding("execution providers", None, "none without ONNX Runtime")
    import onnxruntime

    return Finding("execution providers", ok=True, text=", ".join(onnxruntime.get_available_providers()))


def _gpu() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding("GPU", None, "none that PyTorch sees; all works on a CPU")
    return Finding("GPU", ok=True, text=torch.cuda.get_device_name())


def _npm() -> Finding:
    where = shutil.which("npm")
    text = where or "none; for onnx --page, install Node.js"
    return Finding("npm", where is not None or None, text)
