"""The command line, stage by stage on the embedded model, and every way to use it wrong."""

import copy
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import get_args

import evaluations
import pytest
import tiny
import transformers
import typer
from places import PLANTED, ROOT
from safetensors.numpy import load_file, save_file

import adaras_export
from adaras_export import cli
from adaras_export.cli.examples import EXAMPLES
from adaras_export.cli.options import fitting, progress, rate_of
from adaras_export.core.gate import Gate
from adaras_export.core.neuron_stats import NeuronStats
from adaras_export.core.neurons import NeuronSet
from adaras_export.core.rule import SteeringRule
from adaras_export.core.trace_files import read_questions, read_traces, write_questions, write_traces
from adaras_export.core.traces import Question
from adaras_export.demo import planted
from adaras_export.discovery import identify
from adaras_export.modeling.generation import encode_prompt

pytest.importorskip("sklearn")
pytest.importorskip("scipy")

MODEL = PLANTED
COMMANDS = [
    "demo",
    "questions",
    "collect",
    "identify",
    "merge",
    "gate",
    "tune",
    "rule",
    "eval",
    "report",
    "export",
    "request",
    "verify",
    "refresh",
    "card",
    "sign",
    "push",
    "doctor",
]
TOKENS = ["--max-new-tokens", "40"]

# Each stage: arguments before its output, and after. {0} is the folder of the job.
STAGES = {
    "collect": (
        ["{0}/identify.jsonl", "-m", MODEL, "--attempts", "4", *TOKENS, "--record", "{0}/stats.safetensors"],
        "traces.jsonl",
    ),
    "identify": (["{0}/traces.jsonl", "-m", MODEL, "--keep", "60"], "paper.safetensors"),
    "identify by attribution": (
        ["{0}/traces.jsonl", "-m", MODEL, "--ranking", "attribution", "--stats", "{0}/stats.safetensors"],
        "neurons.safetensors",
    ),
    "gate": (["{0}/traces.jsonl", "-m", MODEL, "--features", "8"], "gate.safetensors"),
    "tune": (
        ["{0}/validation.jsonl", "-m", MODEL, "--neurons", "{0}/neurons.safetensors", "--gate", "{0}/gate.safetensors",
         "--counts", "50", "--strengths", "1,2", *TOKENS],
        "rule.safetensors",
    ),
    "eval": (
        ["{0}/test.jsonl", "-m", MODEL, "--rule", "{0}/rule.safetensors", "--random-controls", "1", *TOKENS],
        "evaluation.json",
    ),
    "export": (
        ["{0}/rule.safetensors", "-m", MODEL, "--to", "hf", "--evaluation", "{0}/evaluation.json"],
        "steered",
    ),
}  # fmt: skip


def arguments(stage, folder, out):
    """The command line of a stage."""
    given, _ = STAGES[stage]
    return [stage.split()[0], *(str(one).format(folder) for one in given), "-o", str(out)]


def call(args):
    """The exit status of `main` with these arguments."""
    verbosity = transformers.logging.get_verbosity()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["adaras-export", *map(str, args)])
        with pytest.raises(SystemExit) as end:
            cli.main()
    transformers.logging.set_verbosity(verbosity)
    return end.value.code or 0


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """On a busy machine the threads of scikit-learn's libraries wait for each other ten times as long as they work."""
    with pytest.importorskip("threadpoolctl").threadpool_limits(1):
        yield


@pytest.fixture(scope="module")
def job(one_thread, tmp_path_factory):
    """A folder in which every stage has left its file."""
    folder = tmp_path_factory.mktemp("job")
    for name, rows in planted.splits({"identify": 24, "validation": 12, "test": 12}, seed=5).items():
        write_questions(folder / f"{name}.jsonl", [Question(r["id"], r["prompt"], r["answer"]) for r in rows])
    for stage, (_, out) in STAGES.items():
        assert call(arguments(stage, folder, folder / out)) == 0, stage
    return folder


@pytest.fixture
def run(capsys):
    """Exit status, standard output and standard error of a command line."""

    def go(*args):
        capsys.readouterr()
        status = call(args)
        return status, *capsys.readouterr()

    return go


@pytest.fixture
def refused(run):
    """The one line that a command line ends with, given that it ends with exit status 2 and nothing else."""

    def go(*args):
        status, out, err = run(*args)
        assert (status, out) == (2, ""), err
        assert err.count("\n") == 1, err
        return err.rstrip("\n")

    return go


def in_a_process(*args, code="from adaras_export.cli import main; main()", **environment):
    path = os.pathsep.join([str(ROOT), *sys.path])
    command = [sys.executable, "-W", "error", "-c", code, *map(str, args)]
    environment = {**os.environ, "PYTHONPATH": path, **environment}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_every_stage_leaves_its_file(job):
    assert len(read_traces(job / "traces.jsonl")) == 96
    assert len(NeuronStats.load(job / "stats.safetensors").questions) > 5
    assert NeuronSet.load(job / "paper.safetensors").ranking == "paper"
    assert len(NeuronSet.load(job / "paper.safetensors")) == 60
    assert NeuronSet.load(job / "neurons.safetensors").ranking == "attribution"
    assert len(Gate.load(job / "gate.safetensors").layer) == 8
    rule = SteeringRule.load(job / "rule.safetensors")
    assert rule.gate.layer.tolist() == Gate.load(job / "gate.safetensors").layer.tolist()
    assert json.loads((job / "evaluation.json").read_text())["rule"] == rule.fingerprint
    assert SteeringRule.load(job / "steered" / "rule.safetensors") == rule


def untimed(path):
    """The same without the seconds that the arms of an evaluation took."""
    return re.sub(rb'"seconds": {[^}]*}', b"", path.read_bytes())


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_run_again_writes_the_same_bytes_and_tells_one_json_object(stage, job, run, tmp_path):
    status, out, err = run(*arguments(stage, job, tmp_path / "again"), "--json")
    assert (status, err) == (0, "")
    assert isinstance(json.loads(out), dict)
    expected, found = job / STAGES[stage][1], tmp_path / "again"
    if stage == "export":
        expected, found = expected / "rule.safetensors", found / "rule.safetensors"
    assert untimed(found) == untimed(expected)


def test_a_gate_stands_beside_what_needs_none_and_leaves_one_file(job, run, tmp_path):
    args = [
        *arguments("gate", job, tmp_path / "g"),
        "--threshold",
        "cost",
        "--cost-missed",
        "3",
        "--cost-needless",
        "1",
    ]
    status, out, err = run(*args)
    assert (status, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()[:-1]] == ["AUC", "gate", "length", "always", "never"]
    assert out.splitlines()[-1].startswith(f"{tmp_path / 'g'}: 8 features of layers ")
    assert [path.name for path in tmp_path.iterdir()] == ["g"]


def test_a_gate_in_half_precision_reads_other_numbers(job, run, tmp_path):
    options = ["--dtype", "bfloat16", "--token-budget", "256"]
    assert run(*arguments("gate", job, tmp_path / "g"), *options)[0] == 0
    assert (tmp_path / "g").read_bytes() != (job / "gate.safetensors").read_bytes()


def test_statistics_recorded_while_sampling_give_the_ranking_of_a_read_of_the_traces(job, run, tmp_path):
    args = [*arguments("identify", job, tmp_path / "n"), "--stats", job / "stats.safetensors"]
    assert run(*args)[0] == 0
    recorded, read = NeuronSet.load(tmp_path / "n"), NeuronSet.load(job / "paper.safetensors")
    places = [set(zip(one.layer.tolist(), one.index.tolist(), strict=True)) for one in (recorded, read)]
    assert len(places[0] & places[1]) >= 58  # float32 sums in another order may swap the last ones


def test_text_output_names_the_file_and_what_was_found(job, run, tmp_path):
    status, out, err = run(*arguments("identify", job, tmp_path / "n.safetensors"))
    assert (status, err) == (0, "")
    assert out.startswith(f"{tmp_path / 'n.safetensors'}: 60 neurons of layers 2 to 3 from")
    status, out, _ = run(*arguments("tune", job, tmp_path / "r.safetensors"))
    assert [line.split("  ")[0] for line in out.splitlines()[1:4]] == ["off", "50 neurons at 1", "50 neurons at 2"]


def test_an_interrupted_collect_goes_on_to_the_same_bytes_and_statistics(job, run, tmp_path):
    whole = (job / "traces.jsonl").read_bytes()
    (tmp_path / "traces.jsonl").write_bytes(whole[: len(whole) // 2])  # in the middle of a line
    stats = tmp_path / "stats.safetensors"
    status, out, _ = run(*arguments("collect", job, tmp_path / "traces.jsonl"), "--record", stats, "--json")
    assert status == 0
    assert (tmp_path / "traces.jsonl").read_bytes() == whole
    assert 40 < json.loads(out)["resumed"] < 56
    found, expected = NeuronStats.load(stats), NeuronStats.load(job / "stats.safetensors")
    assert found.questions == expected.questions
    assert abs(found.correct_sum - expected.correct_sum).max() < 1e-4


def test_an_export_verifies_and_a_tampered_one_ends_with_exit_status_1(job, run, tmp_path):
    status, out, err = run("verify", job / "steered", "--json")
    assert (status, err, json.loads(out)["ok"]) == (0, "", True)
    shutil.copytree(job / "steered", tmp_path / "steered")
    (tmp_path / "steered" / "generation_config.json").write_text("{}")
    status, out, err = run("verify", tmp_path / "steered")
    assert status == 1
    assert "FAIL files changed: 1" in out
    assert re.match(rf"ParityError: {tmp_path / 'steered'}: \d of \d+ checks failed", err)
    assert err.count("\n") == 1


def test_a_verdict_is_one_line_and_verbose_shows_every_check(job, run):
    status, out, err = run("verify", job / "steered")
    verdict, receipt = out.splitlines()
    assert (status, err) == (0, "")
    number, share = re.fullmatch(
        r"PASS (\d+) checks; nearest to its limit: .+: \S+ of \S+ \((\d+)%\)", verdict
    ).groups()
    assert int(share) <= 100
    assert receipt.startswith("receipt ")
    checks = run("verify", job / "steered", "--verbose")[1].splitlines()[:-1]
    assert len(checks) == int(number) > 20
    assert {line[:4] for line in checks} == {"ok  ", "    "}


def test_a_rule_of_a_file_of_identify_is_that_of_the_library(job, run, tmp_path):
    args = ["rule", job / "paper.safetensors", "--gate", job / "gate.safetensors", "--threshold", "0.25"]
    args += ["--keep", "20", "--strength", "-2", "--start", "first_generated_token", "-o", tmp_path / "r"]
    status, out, err = run(*args, "--json")
    assert (status, err) == (0, "")
    rule, neurons = SteeringRule.load(tmp_path / "r"), NeuronSet.load(job / "paper.safetensors").top(20)
    assert json.loads(out)["rule"] == rule.fingerprint
    expected = neurons.in_order()
    for name in ("layer", "index", "delta", "score"):
        assert getattr(rule.neurons, name).tolist() == getattr(expected, name).tolist()
    assert {*neurons.questions} <= {*rule.questions}
    assert (rule.strength, rule.start, rule.gate.threshold) == (-2, "first_generated_token", 0.25)


@pytest.mark.parametrize("header", ["", "layer,index,delta\n", "Layer, Index, Delta\n"])
def test_a_rule_of_a_csv_is_steered_as_the_rows_say(header, run, tmp_path):
    (tmp_path / "n.csv").write_text(f"{header}3,7,0.5\n2,40,-1\n\n3,1,2e-1\n")
    status, out, err = run("rule", tmp_path / "n.csv", "--base", MODEL, "-o", tmp_path / "r")
    assert (status, err) == (0, "")
    assert "3 neurons of layers 2, 3 at strength 1 from last_prompt_token on, for every prompt" in out
    rule = SteeringRule.load(tmp_path / "r")
    assert [rule.neurons.layer.tolist(), rule.neurons.index.tolist()] == [[2, 3, 3], [40, 1, 7]]
    assert rule.neurons.delta.tolist() == pytest.approx([-1, 0.2, 0.5])
    assert rule.gate is None


def test_a_request_is_written_once_the_loss_of_the_gate_is_accepted(job, run, tmp_path):
    args = ["request", job / "rule.safetensors", "-m", MODEL, "-o", tmp_path / "request.json"]
    status, out, err = run(*args)
    assert (status, out) == (2, "")
    assert err.startswith("ExportError: easysteer: cannot express gate; ")
    status, out, err = run(*args, "--accept-loss", "gate", "--json")
    rule = SteeringRule.load(job / "rule.safetensors")
    assert (status, err) == (0, "")
    assert json.loads(out)["lost"] == ["gate"]
    [vector] = json.loads((tmp_path / "request.json").read_text())["vectors"]
    assert (vector["name"], vector["scale"]) == (f"adaras-{rule.fingerprint[:12]}", rule.strength)


def test_a_refresh_says_what_it_wrote(job, run, tmp_path):
    folder = shutil.copytree(job / "steered", tmp_path / "steered")
    status, out, err = run("refresh", folder, "--json")
    assert (status, err, json.loads(out)["changed"]) == (0, "", [])
    assert json.loads(out)["receipt"] == hashlib.sha256((folder / "receipt.json").read_bytes()).hexdigest()


def test_a_card_is_written_anew_and_what_changed_is_said(job, run, tmp_path):
    folder = shutil.copytree(job / "steered", tmp_path / "steered")
    assert run("card", folder, "--repository", "me/steered") == (0, f"{folder}: written: README.md\n", "")
    assert run("card", folder) == (0, f"{folder}: as it was\n", "")
    status, out, err = run("card", folder, "--dataset", "me/traces", "--json")
    assert (status, err, json.loads(out)["changed"]) == (0, "", ["README.md"])
    assert "- me/traces\n" in (folder / "README.md").read_text()
    assert run("verify", folder)[0] == 0


def test_an_evaluation_of_a_named_benchmark_reaches_the_card_and_its_file_of_results(job, run, tmp_path):
    named, folder = tmp_path / "evaluation.json", shutil.copytree(job / "steered", tmp_path / "steered")
    args = arguments("eval", job, named)
    assert run(*args, "--dataset", "me/sums", "--task", "two")[0] == 0
    status, out, _ = run("card", folder, "--evaluation", named)
    assert (status, out) == (0, f"{folder}: written: .eval_results/adaras.yaml, README.md, evaluation.json\n")
    assert "task_id: two" in (folder / ".eval_results" / "adaras.yaml").read_text()
    status, out, _ = run("card", folder, "--evaluation", job / "evaluation.json")
    assert "removed: .eval_results/adaras.yaml" in out


@pytest.mark.parametrize("suffix", [".html", ".md", ".json"])
def test_a_report_is_the_same_from_run_to_run_and_ends_with_what_is_shown(suffix, job, run, tmp_path):
    if suffix == ".html":
        pytest.importorskip("matplotlib")
    paths = [tmp_path / f"{name}{suffix}" for name in ("report", "again")]
    for path in paths:
        status, out, err = run("report", job / "evaluation.json", "-o", path)
        assert (status, err) == (0, "")
        assert out.startswith(f"{path}: evaluation.json, gated: ")
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert out.partition("gated: ")[2].rstrip() in paths[0].read_text().replace("\\", "")


def test_a_report_names_how_the_rule_was_made_where_tune_and_gate_said_it(job, run, tmp_path):
    for stage in ("tune", "gate"):
        (tmp_path / f"{stage}.json").write_text(run(*arguments(stage, job, tmp_path / "again"), "--json")[1])
    files = [job / "evaluation.json", tmp_path / "tune.json", tmp_path / "gate.json"]
    status, out, err = run("report", *files, "-o", tmp_path / "report.md", "--json")
    assert (status, err, [one["file"] for one in json.loads(out)["made"]]) == (0, "", ["tune.json", "gate.json"])
    text = (tmp_path / "report.md").read_text()
    assert "2 settings on validation questions" in text
    assert "| `auc` |" in text


def test_export_copies_where_that_is_asked_for_and_writes_thin_repositories(job, run, tmp_path):
    for options, links in ((["--to", "hf"], 2), (["--to", "hf", "--copy"], 1), (["--to", "hf-thin"], 0)):
        out = tmp_path / options[-1]
        status, _, err = run("export", job / "rule.safetensors", "--base", MODEL, *options, "--out", out)
        assert (status, err) == (0, "")
        weights = [path for path in out.glob("model*.safetensors") if "steering" not in path.name]
        assert [min(path.stat().st_nlink, 2) for path in weights] == ([links] if links else [])


def test_a_negated_vector_fails_the_check_of_what_it_computes(job, run, tmp_path):
    shutil.copytree(job / "steered", tmp_path / "steered")
    (path,) = [one for one in (tmp_path / "steered").glob("*.safetensors") if "steering" in one.name]
    tensors = load_file(path)
    path.unlink()  # it may be a link
    save_file({name: -one if "vector" in name else one for name, one in tensors.items()}, path, {"format": "pt"})
    status, out, _ = run("verify", tmp_path / "steered", "--json")
    failed = [check["check"] for check in json.loads(out)["checks"] if not check["ok"]]
    assert status == 1
    assert "steered always, prefill logits" in failed


def test_help_lists_the_commands_in_the_order_of_the_work(run):
    status, out, err = run("--help")
    lines = [line.strip("│| ").split("  ")[0] for line in out.splitlines()]
    assert (status, err) == (0, "")
    assert [line for line in lines if line in COMMANDS] == COMMANDS


def test_no_arguments_are_answered_with_help(run):
    assert run() == run("--help")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_two_examples_under_both_names(command, run):
    status, out, err = run(command, "--help")
    assert (status, err) == (0, "")
    assert "--json" in out
    assert (status, out, err) == run(command, "-h")
    shown = " ".join(out.partition("Examples:")[2].split())
    assert shown == " ".join(" ".join(EXAMPLES[command]).split())


PROGRAM = typer.main.get_command(cli.app)


@pytest.mark.parametrize("example", [line for lines in EXAMPLES.values() for line in lines])
def test_every_example_is_understood_by_the_command(example, tmp_path, monkeypatch):
    """By the real parser; files and folders that an argument must find are there."""
    monkeypatch.chdir(tmp_path)
    _, command, *words = shlex.split(example)
    for word in words:
        if re.search(r"\.(jsonl?|safetensors|csv|pem)$", word):
            Path(word).touch()
    Path("steered").mkdir()
    context = PROGRAM.commands[command].make_context(command, [*words])
    assert context.args == []


def test_a_model_is_named_the_same_way_everywhere():
    """--base, as the artifacts' commands once had it, still works there."""
    options = {name: {one: p for p in command.params for one in p.opts} for name, command in PROGRAM.commands.items()}
    of_model = {name: own["--model"].opts for name, own in options.items() if "--model" in own and name != "demo"}
    assert {tuple(sorted(names)) for names in of_model.values()} == {("--model", "-m"), ("--base", "--model", "-m")}
    aliased = {name for name, names in of_model.items() if "--base" in names}
    assert (
        aliased
        == {name for name, own in options.items() if "--base" in own}
        == {"rule", "request", "export", "verify", "refresh"}
    )


def test_the_version_is_told(run):
    assert run("--version") == (0, f"adaras-export {adaras_export.__version__}\n", "")


def test_a_shell_completes_commands():
    asked = {"_ADARAS_EXPORT_COMPLETE": "complete_bash", "COMP_WORDS": "adaras-export ver", "COMP_CWORD": "1"}
    done = in_a_process(**asked)
    assert (done.returncode, done.stdout.split()) == (0, ["verify"]), done.stderr


def test_help_does_not_import_torch():
    code = (
        "import sys; from adaras_export.cli import main\n"
        "try: main()\n"
        "finally: print(sorted({'torch', 'transformers', 'numpy', 'sklearn'} & sys.modules.keys()))"
    )
    for args in (["-h"], ["tune", "-h"]):
        done = in_a_process(*args, code=code)
        assert done.returncode == 0, done.stderr
        assert done.stdout.rstrip().endswith("[]")


@pytest.mark.slow
def test_a_process_of_its_own_keeps_standard_error_to_one_line(job, tmp_path):
    """Libraries warn on standard error in ways that a test within this process does not see."""
    done = in_a_process(*arguments("identify", job, tmp_path / "n"))
    assert (done.returncode, done.stderr) == (0, "")
    (tmp_path / "rule").write_bytes(b"no rule")
    done = in_a_process("eval", job / "test.jsonl", "-m", MODEL, "--rule", tmp_path / "rule", "-o", tmp_path / "e")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert done.stderr.startswith(f"ArtifactError: {tmp_path / 'rule'}")


# {bad} is a folder of bad input (see the fixture), {job} the folder of the job, {model} its model; {traces}, {neurons}
# and {rule} are files of the job; {on} says the model and where to write, {to} the base, a target and where to write.
MISSING = {
    "collect, questions": "collect {bad}/none.jsonl {on}",
    "collect, model": "collect {job}/test.jsonl -m {bad}/none -o {bad}/out",
    "identify, traces": "identify {bad}/none.jsonl {on}",
    "identify, model": "identify {traces} -m {bad}/none -o {bad}/out",
    "identify, stats": "identify {traces} {on} --stats {bad}/none",
    "merge, part": "merge {bad}/none -o {bad}/out",
    "gate, traces": "gate {bad}/none.jsonl {on}",
    "gate, model": "gate {traces} -m {bad}/none -o {bad}/out",
    "tune, questions": "tune {bad}/none.jsonl {on} --neurons {neurons}",
    "tune, model": "tune {job}/validation.jsonl -m {bad}/none --neurons {neurons} -o {bad}/out",
    "tune, neurons": "tune {job}/validation.jsonl {on} --neurons {bad}/none",
    "tune, csv": "tune {job}/validation.jsonl {on} --neurons {bad}/none.csv",
    "tune, gate": "tune {job}/validation.jsonl -m {model} --neurons {neurons} --gate {bad}/none -o {bad}/out",
    "eval, questions": "eval {bad}/none.jsonl {on} --rule {rule}",
    "eval, model": "eval {job}/test.jsonl -m {bad}/none --rule {rule} -o {bad}/out",
    "eval, rule": "eval {job}/test.jsonl {on} --rule {bad}/none",
    "report, evaluation": "report {bad}/none -o {bad}/out.md",
    "export, rule": "export {bad}/none {to}",
    "export, base": "export {rule} --base {bad}/none --to hf -o {bad}/out",
    "export, evaluation": "export {rule} {to} --evaluation {bad}/none",
    "verify, folder": "verify {bad}/none",
    "rule, neurons": "rule {bad}/none {on}",
    "rule, model": "rule {bad}/plain.csv -m {bad}/none -o {bad}/out",
    "verify, base": "verify {job}/steered --base {bad}/none",
}
# Told as fast as the rest: importing torch takes seconds. More of what is missing is above, of what is misspelt below.
TOLD_AT_ONCE = (
    *MISSING.values(),
    "identify {traces} {on} --ranking best",
    "identify {traces} {on} --dtype fp16",
    "collect {job}/test.jsonl {on} --check guess",
    "collect {job}/test.jsonl {on} --backend tgi",
    "gate {traces} {on} --pooling max",
    "tune {job}/validation.jsonl {on} --neurons {neurons} --start then",
    "eval {job}/test.jsonl {on} --rule {rule} --compare gated,all",
    "export {rule} --base {model} --to floppy -o {bad}/out",
    "export {rule} {to} --accept-loss gate,stat",
    "eval {job}/test.jsonl {on} --rule {bad}/cut",
    "gate {bad}/label.jsonl {on}",
    "push {bad} user/name --yes",
    "card {bad}",
    "demo --model gpt9",
)
TUNE = "tune {job}/validation.jsonl {on} --neurons {neurons} "
SERVER = "collect {job}/test.jsonl {on} --endpoint http://127.0.0.1:9/v1 "
EVAL = "eval {job}/test.jsonl {on} --rule {rule} "

# Command line -> what its one line says.
WRONG = {
    # input files
    "collect {bad}/malformed.jsonl {on}": r"TraceError: .*malformed.jsonl:2: is not JSON .*column 8",
    "identify {bad}/malformed.jsonl {on}": r"TraceError: .*malformed.jsonl:1: has no .*completion",
    "gate {bad}/label.jsonl {on}": r"TraceError: .*label.jsonl:2: .*correct is 'yes'; expected true",
    "identify {bad}/empty.jsonl {on}": r"TraceError: .*empty.jsonl: is empty",
    "identify {bad}/correct.jsonl {on}": r"TraceError: traces: none of 24 questions has both",
    "identify {bad}/correct.jsonl {on} --per-class 2": r"TraceError: none of 24 questions has both",
    "gate {bad}/correct.jsonl {on}": r"TraceError: traces: 14 of 14 training questions are",
    "eval {job}/validation.jsonl {on} --rule {rule}": r"TraceError: questions: 12 of 12 were used before",
    "tune {job}/identify.jsonl {on} --neurons {neurons}": r"TraceError: questions: \d+ of 24 were used before",
    "collect {job}/test.jsonl -m {model} -o {job}/identify.jsonl": r"TraceError: .*:1: has no question_id",
    "identify {traces} {on} --stats {bad}/cut": r"ArtifactError: .*cut: .*neuron statistics",
    "identify {traces} {on} --stats {job}/gate.safetensors": r"ArtifactError: .*is a gate",
    "tune {job}/validation.jsonl {on} --neurons {bad}/cut": r"ArtifactError: .*cut: .*neurons file",
    TUNE + "--gate {bad}/corrupt": r"ArtifactError: .*corrupt: .*expected a gate file",
    "eval {job}/test.jsonl {on} --rule {bad}/cut": r"ArtifactError: .*cut: .*expected a rule file",
    "eval {job}/test.jsonl {on} --rule {bad}": r"ArtifactError: .*expected a rule file",
    "report {bad}/malformed.jsonl -o {bad}/out.html": r"ArtifactError: .*malformed.jsonl: is not JSON",
    "report {job}/evaluation.json -o {bad}/out": r"ArtifactError: .*out: names no format of a report; expected",
    "report {job}/evaluation.json {job}/evaluation.json -o {bad}/o.md": r"ArtifactError: .*on the same questions",
    "export {bad}/corrupt {to}": r"ArtifactError: .*corrupt: .*expected a rule file",
    "export {rule} {to} --evaluation {bad}/malformed.jsonl": r"ArtifactError: .*malformed.jsonl: ",
    "export {rule} {to} --evaluation {bad}/other.json": r"ExportError: .*other.json: evaluates rule another",
    "verify {model}": r"ArtifactError: .*planted_model: is no exported folder, it has no receipt.json; expected a",
    # neurons of the reference
    "tune {job}/validation.jsonl {on} --neurons {bad}/outside.csv": r"RuleError: .*layer \[27\] outside",
    "tune {job}/validation.jsonl {on} --neurons {bad}/twice.csv": r"RuleError: .*\[3:7\] given more than once",
    "tune {job}/validation.jsonl {on} --neurons {bad}/text.csv": r"RuleError: .*text.csv:2: .*expected numbers",
    "rule {bad}/outside.csv {on}": r"RuleError: .*layer \[27\] outside",
    "rule {bad}/short.csv {on}": r"RuleError: .*short.csv:2: has 2 columns; expected layer, index, delta",
    "rule {bad}/words.csv {on}": r"RuleError: .*words.csv:1: .*expected numbers",
    "rule {bad}/plain.csv -o {bad}/out": r"UsageError: .*does not say which model its neurons belong to; .*--model",
    "rule {bad}/plain.csv {on} --threshold 0.5": r"UsageError: .*--threshold: is the gate's; expected --gate",
    "rule {neurons} -m {bad}/same_shape -o {bad}/out": r"RuleError: .*fingerprint",
    "rule {neurons} -o {bad}/out --gate {job}/gate.safetensors --threshold 2": r"RuleError: gate: threshold 2.0 is no",
    "rule {neurons} -o {bad}/out --keep 201": r"RuleError: neurons: 201 requested; the set has 200",
    # models
    "identify {traces} -m {bad}/moe -o {bad}/out": r"UnsupportedModelError: .*moe: qwen3_moe is a mixture of experts",
    "gate {traces} -m {bad}/bloom -o {bad}/out": r"UnsupportedModelError: .*model_type bloom is not supported",
    "collect {job}/test.jsonl -m {bad}/short -o {bad}/out": r"ArtifactError: .*short/model.safetensors: ",
    "eval {job}/test.jsonl -m {bad}/same_shape --rule {rule} -o {bad}/out": r"RuleError: .*fingerprint",
    "eval {job}/test.jsonl -m {bad}/llama --rule {rule} -o {bad}/out": r"RuleError: .*family llama \(expected qwen3\)",
    "tune {job}/validation.jsonl -m {bad}/same_shape --neurons {neurons} -o {bad}/out": r"RuleError: .*fingerprint",
    "export {rule} --base {bad}/same_shape --to hf -o {bad}/out": r"RuleError: .*fingerprint",
    "identify {traces} -m {bad}/same_shape -o {bad}/out --stats {job}/stats.safetensors": r"RuleError: .*fingerprint",
    # output
    "export {rule} --base {model} --to hf -o {job}/steered": r"ExportError: .*steered: exists already",
    "demo -o {job}": r"ExportError: .*: exists already; choose another folder",
    "identify {traces} -m {model} -o {bad}/none/out": r"UsageError: .*'--out'.*its folder does not exist",
    "gate {traces} -m {model} -o {bad}": r"UsageError: .*'--out'.*is a folder; expected a file",
    "collect {job}/test.jsonl {on} --record {bad}/none/out": r"UsageError: .*'--record'.*its folder",
    # options
    "identify {traces} {on} --ranking best": r"UsageError: .*'--ranking': 'best' is not one of 'paper', 'absolute'",
    "identify {traces} {on} --start now": r"UsageError: .*'--start': 'now' is not one of 'last_prompt_token'",
    "identify {traces} {on} --keep many": r"UsageError: .*'--keep'",
    "identify {traces} {on} --keep 9999": r"RuleError: neurons: 9999 wanted from layer 2 on",
    "identify {traces} {on} --min-layer 4": r"RuleError: neurons: 200 wanted from layer 4 on",
    "identify {traces} {on} --tokens prompt": r"UsageError: .*'--tokens': 'prompt' is not one of 'all', 'completion'",
    "identify {traces} {on} --too-long cut": r"UsageError: .*'--too-long': 'cut' is not one of 'refuse', 'skip'",
    "identify {traces} {on} --device-map cpu": r"UsageError: .*'--device-map': 'cpu' is not one of 'auto'",
    "identify {traces} {on} --token-budget 0": r"TraceError: reading: token_budget is 0; expected 1 or more",
    "identify {traces} {on} --chunk-tokens 0": r"TraceError: reading: chunk_tokens is 0; expected 1 or more",
    "identify {traces} {on} --stats {job}/stats.safetensors --tokens completion": (
        r"TraceError: statistics: are over all tokens of a trace; expected completion"
    ),
    "identify {traces} {on} --shard 4/4": r"UsageError: .*--shard 4/4: expected i/n with i from 0 to n - 1",
    "identify {traces} {on} --shard half": r"UsageError: .*--shard half: expected i/n",
    "identify {traces} {on} --shard 0/2 --stats {job}/stats.safetensors": r"UsageError: .*--shard and --stats",
    "merge {job}/stats.safetensors -o {bad}/out": r"ArtifactError: .*is a neuron statistics file; expected a part",
    "identify {traces} {on} --per-class 0": r"TraceError: per_class is 0; expected a positive",
    "gate {traces} {on} --pooling max": r"UsageError: .*'--pooling': 'max' is not one of 'logistic'",
    "gate {traces} {on} --features 9999": r"RuleError: gate: 9999 features wanted",
    "gate {traces} {on} --below-layer 0": r"RuleError: gate: reads layers below 0; expected 1 to 4",
    "gate {traces} {on} --below-layer 9": r"RuleError: gate: reads layers below 9; expected 1 to 4",
    "gate {traces} {on} --features some": r"UsageError: .*--features some: expected a number, or auto",
    "gate {traces} {on} --threshold half": r"UsageError: .*'--threshold': 'half' is not one of 'youden'",
    "gate {traces} {on} --threshold cost --cost-missed 2": r"UsageError: .*--threshold cost: expected both --cost-mis",
    "gate {traces} {on} --cost-missed 2": r"UsageError: .*--cost-missed and --cost-needless: choose nothing here",
    "gate {traces} {on} --threshold cost --cost-missed 2 --cost-needless 0": r"RuleError: costs: 2 of a wrong answer",
    TUNE + "--strengths 1,strong": r"UsageError: .*--strengths 1,strong: expected numbers with commas between them",
    TUNE + "--strengths 1:0.5 --trials 3": r"RuleError: strengths 1:0.5: no range; expected two numbers",
    TUNE + "--strengths 1:2": r"RuleError: tune: a range of strengths is no grid; expected a number of trials",
    TUNE + "--strengths 1:2:3": r"UsageError: Invalid value: --strengths 1:2:3: expected LOW:HIGH",
    TUNE + "--strengths 1:": r"UsageError: Invalid value: --strengths 1:: expected LOW:HIGH",
    TUNE + "--report trials.csv": r"UsageError: Invalid value: --report .csv: expected one of: .json, .md",
    TUNE + "--neurons {neurons}": r"UsageError: Invalid value: --neurons .*: a file is given twice",
    TUNE + "--strengths 0,1": r"RuleError: tune: .*expected numbers other than 0",
    TUNE + "--strengths nan": r"RuleError: rule: strength is nan; expected a finite number",
    TUNE + "--counts 50.5": r"UsageError: .*--counts 50.5: expected whole numbers, 1 or more",
    TUNE + "--counts nan": r"UsageError: .*--counts nan: expected whole numbers",
    TUNE + "--counts 201": r"RuleError: neurons: 201 requested; the set has 200",
    TUNE + "--start then": r"UsageError: .*--start then: expected one of",
    TUNE + "--check guess": r"UsageError: .*'--check': 'guess' is not one of 'last_number', 'exact'",
    TUNE + "--max-new-tokens 0": r"TraceError: sampling: max_new_tokens 0",
    TUNE + "--max-new-tokens 999": r"TraceError: prompt of 10 tokens: 999 new ones exceed the context of 256",
    TUNE
    + "--gate {bad}/late_gate --start last_prompt_token": r"RuleError: rule: the gate reads layer 3, steering begins",
    EVAL + "--check guess": r"UsageError: .*'--check': 'guess' is not one of",
    EVAL + "--compare gated,all": r"RuleError: compare: no arm 'all'; expected of: gated, always, everywhere",
    EVAL + "--compare gated,": r"RuleError: compare: no arm ''; expected of",
    "eval {job}/test.jsonl {on} --rule {bad}/ungated --compare gated,always": (
        r"RuleError: compare: the rule has no gate for the arm gated; expected of: always, everywhere"
    ),
    EVAL + "--stop @@ --max-new-tokens 40": r"TraceError: stop '@@': no token of the tokenizer contains it",
    "collect {job}/test.jsonl {on} --attempts 0": r"TraceError: collect: attempts is 0; expected 1 or more",
    "collect {job}/test.jsonl {on} --temperature 0": r"TraceError: collect: 8 attempts at temperature 0",
    "collect {job}/test.jsonl {on} --per-class 5": r"TraceError: collect: 5 correct and 5 incorrect attempts of 8",
    "collect {job}/test.jsonl {on} --wanted 0": r"TraceError: collect: wanted is 0; expected 1 or more",
    "collect {job}/test.jsonl {on} --backend tgi": r"UsageError: .*'--backend': 'tgi' is not one of 'transformers'",
    "collect {job}/test.jsonl {on} --backend vllm --record {bad}/o": r"UsageError: .*--record: vLLM shows no",
    "collect {job}/test.jsonl {on} --concurrency 2 --retries 1": r"UsageError: .*--concurrency, --retries: is for",
    SERVER + "--record {bad}/o --dtype bfloat16": r"UsageError: .*--record, --dtype: is for a model",
    SERVER + "--api-key-env ADARAS_NO_KEY": r"UsageError: .*--api-key-env ADARAS_NO_KEY: there is no such",
    SERVER + "--concurrency 0": r"EndpointError: endpoint http://127.0.0.1:9/v1: concurrency 0",
    SERVER + "--temperature 0": r"TraceError: collect: 8 attempts at temperature 0",
    SERVER: r"EndpointError: http://127.0.0.1:9/v1, model .*: cannot be reached .*; run again to go on",
    "collect {job}/test.jsonl {on} --top-p 2": r"TraceError: sampling: top_p 2.0",
    "collect {job}/test.jsonl -m {model} -o {traces}": r"TraceError: .*traces.jsonl: holds question .* not among the",
    "export {rule} --base {model} --to floppy -o {bad}/out": r"UsageError: .*'--to': 'floppy' is not one of 'hf'",
    "export {rule} {to} --accept-loss gate,stat": r"UsageError: .*--accept-loss stat: expected one of: gate, start",
    "export {rule} {to} --calibration {traces}": r"ExportError: hf: has no option calibration",
    "export {rule} --base {model} --to onnx -o {bad}/out --calibration {traces}": r"ExportError: .* with fp32",
    "export {rule} --base {model} --to onnx -o {bad}/out --precision int4 --calibration {bad}/malformed.jsonl": (
        r"TraceError: .*malformed.jsonl:2: is not JSON"
    ),
    r"export {rule} --base {model} --to peft -o {bad}/out --accept-loss gate --start-at =\n": (
        r"ExportError: peft: start_at '=\\n': prompts of .* end with '<\|assistant\|>'; expected the end of that text"
    ),
    "card {bad}": r"ArtifactError: .*receipt.json",
    "card {job}/steered --repository steered": r"UsageError: .*--repository steered: cannot be a Hub id; expected USER",
    "card {job}/steered --evaluation {bad}/other.json": r"ExportError: .*evaluates rule another",
    "card {job}/steered --dataset [x](y)": r"ExportError: datasets: .* cannot be Hub ids; expected USER/NAME",
    EVAL + "--dataset a/b/c": r"TraceError: dataset 'a/b/c': is no Hub id; expected USER/NAME",
    EVAL + "--task two": r"TraceError: task two: names no dataset; expected its Hub id, too",
    "demo --model gpt9 -o {bad}/out": r"UsageError: .*'--model': 'gpt9' is not one of 'planted', 'smollm2'",
    # the command line itself
    "nothing": r"UsageError: No such command 'nothing'; see adaras-export --help",
    "gate": r"UsageError: Missing argument .*; see adaras-export gate --help",
    "gate {traces} -o {bad}/out": r"UsageError: Missing option '--model'",
    "verify {job}/steered --fast": r"UsageError: No such option: --fast",
}


@pytest.fixture(scope="module")
def bad(job, folders, tmp_path_factory):
    """A folder of bad input."""
    folder = tmp_path_factory.mktemp("bad")
    traces, rule = read_traces(job / "traces.jsonl"), (job / "rule.safetensors").read_bytes()
    (folder / "malformed.jsonl").write_text('{"id": 1, "prompt": "1+1", "answer": 2}\n{"id": ]\n')
    (folder / "label.jsonl").write_text(
        '{"id": 1, "question_id": 1, "prompt": "1+1", "completion": "2", "correct": true}\n'
        '{"id": 2, "question_id": 1, "prompt": "1+1", "completion": "3", "correct": "yes"}\n'
    )
    (folder / "empty.jsonl").write_text("\n")
    write_traces(folder / "correct.jsonl", [replace(trace, correct=True) for trace in traces])
    (folder / "cut").write_bytes(rule[: len(rule) // 2])
    (folder / "corrupt").write_bytes(b"\xff" * 64)
    SteeringRule.load(job / "rule.safetensors").ungated().save(folder / "ungated")
    (folder / "other.json").write_text(json.dumps({**evaluations.GAIN, "rule": "another"}))
    replace(tiny.make_gate(), layer=[0, 1, 2, 3, 3], base=None).save(folder / "late_gate")
    header = "overall_neuron_index,layer,neuron_index_in_layer,weight\n"
    (folder / "outside.csv").write_text(f"{header}{27 * 384 + 5},27,5,1.0\n")
    (folder / "twice.csv").write_text(f"{header}{3 * 384 + 7},3,7,1.0\n{3 * 384 + 7},3,7,2.0\n")
    (folder / "plain.csv").write_text("3,7,1.0\n")
    (folder / "short.csv").write_text("3,7,1.0\n3,8\n")
    (folder / "words.csv").write_text("three,7,1.0\n")
    (folder / "text.csv").write_text(f"{header}a,b,c,d\n")
    bad_models(folder, folders)
    return folder


def bad_models(folder, folders):
    """Copies of the embedded model, each with one thing wrong, and a model of another family."""
    config = json.loads((MODEL / "config.json").read_text())
    for name, changes in {
        "moe": {"model_type": "qwen3_moe", "num_experts": 8},
        "bloom": {"model_type": "bloom"},
        "short": {},
        "same_shape": {},
    }.items():
        shutil.copytree(MODEL, folder / name)
        (folder / name / "config.json").write_text(json.dumps(config | changes))
    weights = (MODEL / "model.safetensors").read_bytes()
    (folder / "short" / "model.safetensors").write_bytes(weights[:-1000])
    tensors = load_file(MODEL / "model.safetensors")
    save_file(
        {name: one + 1 for name, one in tensors.items()}, folder / "same_shape" / "model.safetensors", {"format": "pt"}
    )
    shutil.copytree(folders["llama"], folder / "llama")


def written_out(command, job, bad):
    """The words of a command line above."""
    files = {"traces": "traces.jsonl", "neurons": "neurons.safetensors", "rule": "rule.safetensors"}
    to = f"--base {MODEL} --to hf -o {bad}/out"
    names = {name: job / file for name, file in files.items()} | {"on": f"-m {MODEL} -o {bad}/out", "to": to}
    return command.format(bad=bad, job=job, model=MODEL, **names).split()


@pytest.mark.parametrize("what", MISSING)
def test_a_missing_file_or_model_is_named(what, job, bad, refused):
    line = refused(*written_out(MISSING[what], job, bad))
    assert str(bad / "none") in line
    assert not (bad / "out").exists()


ALL_IN_ONE = """
import json, sys
from adaras_export import cli
for words in json.load(sys.stdin):
    sys.argv = ["adaras-export", *words]
    try:
        cli.main()
    except SystemExit as end:
        print(end.code, *({"torch", "transformers"} & {*sys.modules}), *words)
"""


def test_what_is_missing_or_misspelt_is_told_before_torch_is_imported(job, bad):
    """Symptom: a typo in --ranking was told after 7 seconds of CPU time, spent on imports."""
    commands = [written_out(command, job, bad) for command in TOLD_AT_ONCE]
    done = subprocess.run(
        [sys.executable, "-c", ALL_IN_ONE], input=json.dumps(commands), capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [f"2 {' '.join(words)}" for words in commands]
    assert done.stderr.count("\n") == len(commands)


def test_the_choices_of_options_are_those_of_the_library():
    """They are written out in the command line, so that it need not import what takes seconds."""
    from adaras_export import exporters
    from adaras_export.cli import demo, demo_job, identify, options
    from adaras_export.cli.export import Feature, Target
    from adaras_export.core import rule as rule
    from adaras_export.data import checkers
    from adaras_export.discovery import rankings
    from adaras_export.exporters import base
    from adaras_export.modeling import loading

    for choices, expected in (
        (options.CheckerName, checkers.CHECKERS),
        (options.Dtype, get_args(loading.Dtype)),
        (options.Starts, get_args(rule.Start)),
        (get_args(identify.RankingName)[0], rankings.RANKINGS),
        (Target, exporters.TARGETS),
        (Feature, get_args(base.Feature)),
        (demo.Model, demo_job.TASKS),
    ):
        assert get_args(choices) == (*expected,)


@pytest.mark.parametrize("command", WRONG)
def test_wrong_use_ends_with_one_line_and_exit_status_2(command, job, bad, refused):
    line = refused(*written_out(command, job, bad))
    assert re.match(WRONG[command], line), line
    (bad / "out").unlink(missing_ok=True)


@pytest.mark.parametrize(("module", "stage"), [("sklearn.linear_model", "gate"), ("scipy.stats", "eval")])
def test_a_missing_library_names_the_extra_to_install(module, stage, job, refused, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    line = refused(*arguments(stage, job, tmp_path / "out"))
    assert line.startswith("MissingExtraError: ")
    assert line.endswith("run: pip install 'scikit-learn>=1.5' 'scipy>=1.13'")
    assert not (tmp_path / "out").exists()


def test_the_math_verify_checker_names_its_extra(job, refused, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    line = refused(*arguments("tune", job, tmp_path / "out"), "--check", "math_verify")
    assert "needs math_verify" in line
    assert "'math-verify>=0.7'" in line


def test_without_a_number_of_new_tokens_so_many_are_sampled_as_fit_the_context(job, run, tmp_path):
    """Symptom: the README's commands failed on the embedded model, whose context is half of the default."""
    write_questions(tmp_path / "q.jsonl", read_questions(job / "test.jsonl")[:2])
    command = ["collect", tmp_path / "q.jsonl", "-m", MODEL, "-o", tmp_path / "t.jsonl"]
    status, out, err = run(*command, "--attempts", "1", "--temperature", "0")
    assert (status, err) == (0, "")
    assert "; --max-new-tokens 246, which fits the model's context" in out


def test_the_default_of_new_tokens_is_what_fits_and_a_given_number_stays(stock, tokenizer):
    model = copy.copy(stock["llama"])
    asked = [Question("short", "ab", "x"), Question("long", [{"role": "user", "content": "abc" * 5}], "x")]
    longest = len(encode_prompt(tokenizer, asked[1].prompt))
    for context, expected in ((longest + 7, 7), (longest + 512, 512), (9999, 512), (longest, 512)):
        model.config = copy.copy(model.config)
        model.config.max_position_embeddings = context
        assert fitting(None, model, tokenizer, asked) == expected
        assert fitting(600, model, tokenizer, asked) == 600


def test_seen_questions_can_be_allowed_by_name(job, run, tmp_path):
    args = [str(job / "validation.jsonl"), *arguments("eval", job, tmp_path / "e")[2:]]
    status, out, _ = run("eval", *args, "--allow-seen", "--json")
    assert status == 0
    assert json.loads(out)["verdicts"]["id"] == [question.id for question in read_questions(job / "validation.jsonl")]


def test_ways_to_run_the_rule_are_compared_in_text_and_json_and_the_file(job, run, tmp_path):
    args = [*arguments("eval", job, tmp_path / "e"), "--compare", "everywhere,gated"]
    status, out, err = run(*args)
    assert (status, err) == (0, "")
    assert "everywhere against gated: " in out.splitlines()[-1]
    assert any(line.split()[:2] == ["minus", "gated"] for line in out.splitlines()), out
    told = json.loads(run(*args, "--json")[1])
    assert told == json.loads((tmp_path / "e").read_text())
    assert [gap["name"] for gap in told["comparison"]["gaps"]] == ["gated", "everywhere"]
    export = run("export", job / "rule.safetensors", "--base", MODEL, "--to", "hf", "--evaluation", tmp_path / "e",
                 "-o", tmp_path / "steered")  # fmt: skip
    assert export[0] == 0
    assert "Compared with `gated`" in (tmp_path / "steered" / "README.md").read_text()


def test_an_unpaired_contrast_is_warned_about(job, run, tmp_path):
    status, _, err = run(*arguments("identify", job, tmp_path / "n"), "--unpaired")
    assert status == 0
    assert err.startswith("warning: unpaired contrast finds what tells easy questions from hard ones")
    assert err.count("\n") == 1


def test_a_reference_csv_can_be_tuned(job, run, tmp_path):
    lines = [f"{3 * 384 + n},3,{n},{n % 3 - 1}.5" for n in range(20)]
    header = "overall_neuron_index,layer,neuron_index_in_layer,weight"
    (tmp_path / "top_200.csv").write_text("\n".join([header, *lines]))
    args = ["tune", job / "validation.jsonl", "-m", MODEL, "--neurons", tmp_path / "top_200.csv", *TOKENS]
    status, out, err = run(*args, "--counts", "5,20", "--strengths", "0.3", "-o", tmp_path / "r")
    assert (status, err) == (0, "")
    assert out.endswith("which questions they were found: neither tune nor eval can refuse those\n")
    assert SteeringRule.load(tmp_path / "r").neurons.ranking == "given"


def test_tune_chooses_among_rankings_and_reports_every_trial(job, run, tmp_path):
    args = ["tune", job / "validation.jsonl", "-m", MODEL, *TOKENS, "-o", tmp_path / "r", "--first", "4"]
    args += ["--neurons", job / "paper.safetensors", "--neurons", job / "neurons.safetensors", "--counts", "50"]
    args += ["--strengths", "1,2", "--start", "last_prompt_token,first_generated_token", "--report", tmp_path / "t.md"]
    status, out, err = run(*args, "--json")
    assert (status, err) == (0, "")
    record = json.loads(out)
    assert {(one["ranking"], one["start"]) for one in record["trials"]} == {
        (ranking, start) for ranking in ("paper", "neurons") for start in ("last_prompt_token", "first_generated_token")
    }
    assert record["rule"] == SteeringRule.load(tmp_path / "r").fingerprint
    assert "stopped" in (tmp_path / "t.md").read_text()
    assert sorted(one.name for one in tmp_path.iterdir()) == ["r", "t.md"]  # the journal is gone


def test_json_holds_no_nan(job, run, tmp_path):
    """Symptom: with one mixed question the split-half cosine is NaN, which json writes and no JSON parser reads."""
    traces = read_traces(job / "traces.jsonl")
    mixed = [t for t in traces if {one.correct for one in traces if one.question_id == t.question_id} == {True, False}]
    write_traces(tmp_path / "one.jsonl", [t for t in mixed if t.question_id == mixed[0].question_id])
    args = ["identify", tmp_path / "one.jsonl", "-m", MODEL, "-o", tmp_path / "n", "--ranking", "attribution"]
    status, out, _ = run(*args, "--json")
    assert (status, json.loads(out)["split_half_cosine"]) == (0, None)
    assert "NaN" not in out


def test_shards_merge_to_the_file_of_one_process(job, run, refused, tmp_path):
    parts = [tmp_path / f"part{index}" for index in range(2)]
    shared = [job / "traces.jsonl", "-m", MODEL, "--token-budget", "300", "--chunk-tokens", "16"]
    for index, part in enumerate(parts):
        status, out, err = run("identify", *shared, "--shard", f"{index}/2", "-o", part)
        assert (status, err) == (0, "")
        assert out.startswith(f"{part}: sums of shard {index}/2, ")
    assert run("identify", *shared, "-o", tmp_path / "whole", "--keep", "60")[0] == 0
    status, out, _ = run("merge", *reversed(parts), "-o", tmp_path / "merged", "--keep", "60", "--json")
    assert (status, json.loads(out)["neurons"]) == (0, 60)
    assert (tmp_path / "merged").read_bytes() == (tmp_path / "whole").read_bytes()
    assert "chunks are in none of them" in refused("merge", parts[0], "-o", tmp_path / "n")
    assert "is given twice; expected each part once" in refused("merge", parts[0], parts[0], "-o", tmp_path / "n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged", "part0", "part1", "whole"]


def test_an_interrupted_identify_goes_on_from_the_file_beside_its_output(job, run, tmp_path, monkeypatch):
    asked = [*arguments("identify", job, tmp_path / "n"), "--token-budget", "300"]
    chunks, read = [], identify.trace_means

    def interrupted(*args):
        chunks.append(1)
        if len(chunks) == 2:
            raise KeyboardInterrupt
        return read(*args)

    monkeypatch.setattr(identify, "trace_means", interrupted)
    assert run(*asked)[0] == 130
    assert [path.name for path in tmp_path.iterdir()] == ["n.partial"]
    assert run(*asked)[0] == 0
    whole = len(chunks) - 1
    assert [path.name for path in tmp_path.iterdir()] == ["n"]
    again = tmp_path / "again"
    chunks[:] = [1] * 2
    assert run(*asked[:-3], again, *asked[-2:])[0] == 0
    assert len(chunks) - 2 == whole > 1  # the interrupted run had read one chunk, and its second one was read again
    assert again.read_bytes() == (tmp_path / "n").read_bytes()


def test_traces_beyond_the_context_are_left_out_with_a_warning(job, run, refused, tmp_path):
    traces = read_traces(job / "traces.jsonl")
    long = replace(traces[0], id="long", completion="1" * 300)
    write_traces(tmp_path / "long.jsonl", [*traces, long])
    asked = ["identify", tmp_path / "long.jsonl", "-m", MODEL, "-o", tmp_path / "n"]
    assert "1 of 97 exceed the model's context of 256 tokens (the longest, long" in refused(*asked)
    status, out, err = run(*asked, "--too-long", "skip", "--json")
    assert (status, json.loads(out)["skipped_traces"]) == (0, 1)
    assert err == "warning: traces left out because they exceed the model's context of 256 tokens: 1\n"
    _, _, err = run(*asked, "--too-long", "read")
    assert err == "warning: traces read beyond the model's context of 256 tokens, which it was not made for: 1\n"


def test_a_line_end_in_stop_is_written_as_backslash_n(job, run, tmp_path):
    """Not translated, it would be two characters that no token of the embedded model contains."""
    assert run(*arguments("eval", job, tmp_path / "e"), "--stop", "\\n")[0] == 0
    status, _, _ = run(*arguments("collect", job, tmp_path / "t"), "--record", tmp_path / "s", "--stop", ",")
    assert status == 0
    assert not any("," in trace.completion for trace in read_traces(tmp_path / "t"))


def test_an_interrupt_is_one_line_too(run, job, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("adaras_export.discovery.identify.job_of", interrupted)
    status, out, err = run(*arguments("identify", job, tmp_path / "n"))
    assert (status, out) == (130, "")
    assert err == "Interrupted: run the same again; collect, identify, gate, tune and eval go on where they were\n"


@pytest.mark.parametrize(("per_second", "said"), [(None, ""), (0.0, ""), (12.34, "12.3/s"), (0.25, "4.0 s each")])
def test_a_rate_is_told_in_words(per_second, said):
    assert rate_of(per_second) == said


def test_a_bar_on_a_terminal_shows_how_much_is_done_and_how_fast(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with progress() as bar:
        tell = bar("sampling")
        for done in (0, 10, 20):
            tell(done, 40)
            time.sleep(0.01)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().err)
    assert "20/40" in shown
    assert re.search(r"\d/s", shown)
