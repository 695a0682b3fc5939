"""Opens exports where the library cannot be imported, and audits what their code causes. A script, never imported.

Reads a list of jobs as JSON from standard input, each {"folder", "base", "prompts", "pad", "modes"}, and prints the
results as JSON on the last line: by mode (all where "modes" is null) the events of Python's audit hooks that the code
of the repository caused while it was imported, opened and used, each [event, what, function], and the files it read.

What counts. Transformers copies a repository's code to a folder of its own, so a frame of the payload is known by its
file. An event is caused by the payload where a frame of it is on the stack of the thread, however many frames of
libraries lie between: what torch and Transformers do for the payload is the payload's doing. So that their own lazy
imports do not count, the unsteered base goes through the same modes first. While prompts are read and tokens are
generated, nothing is excused. While the repository is opened, four things are, by the innermost frame of the payload:

* an import statement at module level: what the import system does for it. The modules are a closed list, which
  tests/support/payload_rules.py checks.
* a class, also one that `steered_class` makes: `typing` and `dataclasses` compile its annotations and methods, at the
  wish of Transformers' base classes.
* `from_pretrained`, which hands over to Transformers: reading (not writing) files of the repository, and of the base
  where the repository is one of hf-thin, whose loader has more functions for that. They are reported as "reads".
* the same in hf-thin, which has Transformers open the repository's code: copying it to the folder of such code, and
  importing it.

What audit hooks cannot see is what compiled code does on its own (safetensors opens files in Rust). Against that stands
the closed list of what the payload may take from torch, in tests/support/payload_rules.py.
"""

import inspect
import json
import os
import sys
import threading

sys.modules["adaras_export"] = None  # importing it fails from here on

import torch  # noqa: E402
import transformers  # noqa: E402

torch.set_num_threads(1)
NAMES = inspect.signature(transformers.GenerationMixin.prepare_inputs_for_generation).parameters
CACHE = "cache" if "cache" in NAMES else "past_key_values"  # Transformers 5.24 changed the name
transformers.utils.logging.disable_progress_bar()

CODE = os.path.join(os.environ["HF_MODULES_CACHE"], "transformers_modules")  # noqa: PTH118
WATCHED = (
    *("open", "import", "exec", "compile", "os.", "shutil.", "glob.", "tempfile.", "mmap.", "fcntl.", "pathlib."),
    *("socket.", "urllib.", "http.", "ftplib.", "smtplib.", "imaplib.", "poplib.", "subprocess.", "pty.", "ctypes."),
    *("pickle.", "marshal.", "code.__new__", "function.__new__", "cpython.", "sqlite3.", "webbrowser."),
)
OPENING = {"<module>", "__init_subclass__", "from_pretrained", "steered_class"}
READERS = {"from_pretrained", "_checkpoint", "_generation", "_fill", "_require_fingerprint"}
MOUNTS = "/proc/mounts"  # Transformers looks at it before it reads weights, those of the base too


class Audit:
    """Collects the events that frames of the payload cause, while it is armed."""

    def __init__(self):
        self.armed = False
        self.readable = ()
        self.caused = []
        self.reads = set()

    def hook(self, event, arguments):
        if not self.armed or not event.startswith(WATCHED):
            return
        frame, between = sys._getframe(1), []
        while frame is not None and not frame.f_code.co_filename.startswith(CODE):
            between.append(frame.f_code.co_filename)
            frame = frame.f_back
        if frame is not None and not self.excused(event, arguments, between, frame.f_code.co_name):
            self.caused.append([event, str(arguments[:1])[:200], frame.f_code.co_name])

    def excused(self, event, arguments, between, function):
        """Whether this is a part of opening the repository, as the docstring of this file has it."""
        if function == "<module>" and (
            event == "import" or any(name.startswith("<frozen importlib") for name in between)
        ):
            return True
        if event in {"compile", "exec"} and function in OPENING and between:
            return between[0].endswith(("/typing.py", "/dataclasses.py")) or self.importing(between)
        if function not in READERS or not arguments:
            return False
        path = os.path.realpath(str(arguments[0])) + os.sep * (event == "os.listdir")
        if self.importing(between) and (event in {"import", "marshal.loads"} or path.startswith(CODE)):
            return True
        return self.reading(event, path, arguments)

    def importing(self, between):
        """Whether Transformers opens the code of a repository."""
        return any(name.endswith("/transformers/dynamic_module_utils.py") for name in between)

    def reading(self, event, path, arguments):
        """Whether this is the reading of a file that lies where it may; it is noted."""
        if event == "os.listdir" or path == os.path.realpath(MOUNTS):
            return path.startswith((*self.readable, os.path.realpath(MOUNTS)))
        if event != "open" or set(str(arguments[1] or "r")) & set("wax+") or arguments[2] & os.O_ACCMODE:
            return False
        if path.startswith(self.readable):
            self.reads.add(os.path.basename(path))  # noqa: PTH119
        return path.startswith(self.readable)


AUDIT = Audit()
sys.addaudithook(AUDIT.hook)


def padded(rows, pad):
    width = max(map(len, rows))
    ids = [[pad] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def generate(model, job, **how):
    settings = {"do_sample": False, "max_new_tokens": 4, "pad_token_id": job["pad"], **how}
    return model.generate(**padded(job["prompts"], job["pad"]), **settings)


def alone(model, job, **how):
    settings = {"do_sample": False, "max_new_tokens": 4, "pad_token_id": job["pad"], **how}
    return model.generate(torch.tensor([job["prompts"][-1]]), **settings)


def embedded(model, job):
    embeds = model.get_input_embeddings()(torch.tensor([job["prompts"][-1]])).detach()
    return model.generate(inputs_embeds=embeds, do_sample=False, max_new_tokens=4, pad_token_id=job["pad"])


def threads(model, job):
    several = [threading.Thread(target=alone, args=(model, job)) for _ in range(3)]
    for one in several:
        one.start()
    for one in several:
        one.join()


def bare(model, job):
    ours = {"steering_start": 2} if hasattr(model, "steering") else {}
    with torch.no_grad():
        cache = model(torch.tensor([job["prompts"][-1]]), use_cache=True, **ours).past_key_values
        model(torch.tensor([[7]]), **{CACHE: cache})


def trained(model, job):
    """A backward pass with gradient checkpointing."""
    model.train()
    model._set_gradient_checkpointing(enable=True)
    ids = torch.tensor([job["prompts"][-1]])
    model(ids, labels=ids).loss.backward()
    model._set_gradient_checkpointing(enable=False)
    model.eval()


def dialled(model, job):
    if not hasattr(model, "steering"):
        return
    with model.steering.off():
        alone(model, job)
    model.steering.strength, model.steering.threshold = 0.5, 2.0
    alone(model, job)
    assert model.steering.active
    assert [steered for _, steered in model.steering.last_decisions] in ([], [True])


MODES = {
    "greedy": generate,
    "no KV cache": lambda model, job: generate(model, job, use_cache=False),
    "static cache": lambda model, job: generate(model, job, cache_implementation="static", disable_compile=True),
    "beams": lambda model, job: generate(model, job, num_beams=2),
    "sampled": lambda model, job: generate(model, job, do_sample=True, num_return_sequences=2),
    "chunked prefill": lambda model, job: alone(model, job, prefill_chunk_size=3),
    "prompt lookup": lambda model, job: alone(model, job, prompt_lookup_num_tokens=2),
    "embeddings": embedded,
    "threads": threads,
    "bare calls": bare,
    "training": trained,
    "dials": dialled,
}


def opened(folder, **how):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **how).eval()


def warm_up(job, known=set()):  # noqa: B006 - once for each base
    if job["base"] not in known:
        known.add(job["base"])
        base = opened(job["base"])
        for run in MODES.values():
            run(base, job)


def audited(job):
    warm_up(job)
    AUDIT.readable = tuple(f"{os.path.realpath(folder)}{os.sep}" for folder in (job["folder"], job["base"]))
    found, AUDIT.reads = {}, set()
    model = None
    for mode, run in {"opening": None, **{mode: MODES[mode] for mode in job["modes"] or MODES}}.items():
        AUDIT.caused, AUDIT.armed = [], True
        try:
            if run is None:
                model = opened(job["folder"], trust_remote_code=True)
            else:
                run(model, job)
        finally:
            AUDIT.armed = False
        found[mode] = AUDIT.caused
    return {"caused": {mode: events for mode, events in found.items() if events}, "reads": sorted(AUDIT.reads)}


def main():
    results = [audited(job) for job in json.load(sys.stdin)]
    print("\n" + json.dumps({"modes": ["opening", *MODES], "results": results}))


if __name__ == "__main__":
    main()
