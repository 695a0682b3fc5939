"""All errors that a user's input can cause, in one tree.

AdarasError
├── TraceError             a trace, question or split is unusable; names path:line
├── UnsupportedModelError  an architecture or a format of weights that core/ does not know
├── ArtifactError          an artifact or model file is missing, damaged or of another kind
│   └── HubError           a repository cannot be read or written
├── RuleError              a neuron set, gate or rule that contradicts itself or the model
├── ExportError            a target cannot express the rule, or cannot be written
├── ParityError            an artifact does not behave like the rule
├── DistributionError      the processes of a distributed run have lost contact
├── EndpointError          a completion server cannot be reached, refuses the request, or sends an unexpected answer
├── MissingExtraError      an optional library is not installed
└── BrokenInstallationError  an installed library does not work, or conflicts with another one

A message is one line: subject, found, expected, remedy; control characters are escaped. The command line turns
ParityError into exit 1 and every other AdarasError into exit 2; any other exception is a bug and keeps its traceback.
"""

import importlib
import shlex
from importlib.metadata import PackageNotFoundError, requires
from types import ModuleType

_LONGEST = 2000


def printable(text: str) -> str:
    """Escape control characters and shorten long text, so that it fits one line of a terminal."""
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"
    return visible(text)


def visible(text: str) -> str:
    """Escape all characters that are not printable; spaces stay."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


class AdarasError(Exception):
    """Base of all errors that the user can act on."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class TraceError(AdarasError):
    """A trace, question or split cannot be used."""


class UnsupportedModelError(AdarasError):
    """The architecture is not in core/families.py, or the format of the weights not in core/quantised.py."""


class ArtifactError(AdarasError):
    """An artifact or model file is missing, damaged or of another kind."""


class HubError(ArtifactError):
    """A repository of the Hub cannot be read or written."""


class RuleError(AdarasError):
    """A neuron set, gate or rule is inconsistent, or made for another model."""


class ExportError(AdarasError):
    """A target cannot express the rule, or the artifact cannot be written."""


class ParityError(AdarasError):
    """An artifact does not behave like the rule that it was written from."""


class DistributionError(AdarasError):
    """The processes of a distributed run have lost contact."""


class EndpointError(AdarasError):
    """A completion server cannot be reached, refuses the request, or sends an unexpected answer."""


class MissingExtraError(AdarasError):
    """An optional library is not installed."""


class BrokenInstallationError(AdarasError):
    """An installed library does not work, or conflicts with another one."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return str(error).strip().partition("\n")[0]


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """The imported module.

    Raises:
        MissingExtraError: its library is not installed.
        BrokenInstallationError: its library is installed, but cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        library, install = module.partition(".")[0], f"run: {install_command(extra)}"
        if isinstance(error, ModuleNotFoundError) and str(error.name).partition(".")[0] == library:
            raise MissingExtraError(f"{purpose} needs {library}, which is not installed; {install}") from error
        found = f"which is installed, but does not import ({first_line(error)})"
        raise BrokenInstallationError(f"{purpose} needs {library}, {found}; {install} --force-reinstall") from error


def install_command(extra: str) -> str:
    """The pip command that installs the libraries of an extra; it names them, since adaras-export is on no index."""
    from packaging.requirements import Requirement  # Transformers and huggingface_hub bring it

    try:
        requirements = requires("adaras-export") or ()
    except PackageNotFoundError:  # run from source, not installed
        return f"pip install '.[{extra}]' in a clone of adaras-export"
    markers = {line: Requirement(line).marker for line in requirements}
    chosen = [line for line, marker in markers.items() if marker and marker.evaluate({"extra": extra})]
    return f"pip install {shlex.join(line.partition(';')[0].strip() for line in chosen)}"
