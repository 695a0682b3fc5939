"""Every error that a user's input can cause, in one tree.

AdarasError
├── TraceError             a trace, question or split is unusable; names path:line
├── UnsupportedModelError  an architecture that models.py does not know
├── ArtifactError          one of our files is missing, corrupt or of another kind
│   └── HubError           a repository cannot be read or written
├── RuleError              a neuron set, gate or rule that contradicts itself or the model
├── ExportError            a target cannot express the rule, or cannot be written
├── ParityError            an artifact does not behave like the rule
├── DistributionError      the processes that do a job together have lost each other
├── EndpointError          a server of completions cannot be reached, refuses, or answers something else
├── MissingExtraError      an optional library is not installed
└── BrokenInstallationError  a library or target does not work, or libraries exclude each other

A message is one line: subject, found, expected, remedy; control characters are escaped. The command line turns
ParityError into exit 1 and every other AdarasError into exit 2; anything else is a bug of ours and keeps its traceback.
"""

import importlib
import shlex
from importlib.metadata import PackageNotFoundError, requires
from types import ModuleType

_LONGEST = 2000


def printable(text: str) -> str:
    """Text for a terminal, in one line of bearable length: control characters, as names of files may hold, escaped."""
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"
    return visible(text)


def visible(text: str) -> str:
    """``text`` with all that cannot be seen, or changes how the rest is seen, escaped; spaces stay."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


class AdarasError(Exception):
    """Base of all errors that the user can act on."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class TraceError(AdarasError):
    """A trace, question or split cannot be used."""


class UnsupportedModelError(AdarasError):
    """The architecture is not in the table of models.py."""


class ArtifactError(AdarasError):
    """A file of ours is missing, damaged or of another kind."""


class HubError(ArtifactError):
    """A repository of the Hub cannot be read or written."""


class RuleError(AdarasError):
    """A neuron set, gate or rule is inconsistent, or made for another model."""


class ExportError(AdarasError):
    """A target cannot express the rule, or the artifact cannot be written."""


class ParityError(AdarasError):
    """An artifact does not behave like the rule that it was written from."""


class DistributionError(AdarasError):
    """The processes that do a job together have lost each other."""


class EndpointError(AdarasError):
    """A server of completions cannot be reached, refuses, or answers something else."""


class MissingExtraError(AdarasError):
    """An optional library is not installed."""


class BrokenInstallationError(AdarasError):
    """A library that is installed does not work, alone or beside another one."""


def first_line(error: BaseException) -> str:
    """What an error of another library says first."""
    return str(error).strip().partition("\n")[0]


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """The imported module.

    Raises:
        MissingExtraError: its library is not installed.
        BrokenInstallationError: it is, but cannot be imported.
    """
    library, install = module.partition(".")[0], f"run: {install_command(extra)}"
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and str(error.name).partition(".")[0] == library:
            raise MissingExtraError(f"{purpose} needs {library}, which is not installed; {install}") from error
        found = f"which is installed, but does not import ({first_line(error)})"
        raise BrokenInstallationError(f"{purpose} needs {library}, {found}; {install} --force-reinstall") from error


def install_command(extra: str) -> str:
    """What brings the libraries of an extra, from wherever this library was installed: it is on no index itself."""
    from packaging.requirements import Requirement  # Transformers and huggingface_hub bring it

    try:
        asked = requires("adaras-export") or ()
    except PackageNotFoundError:  # run from its source, without an installation
        return f"pip install '.[{extra}]' in a clone of adaras-export"
    markers = {line: Requirement(line).marker for line in asked}
    wanted = [line.partition(";")[0].strip() for line, one in markers.items() if one and one.evaluate({"extra": extra})]
    return f"pip install {shlex.join(wanted)}"
