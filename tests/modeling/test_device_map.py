"""Models whose weights Accelerate keeps elsewhere: in memory, or on the disk until a layer runs."""

import pytest
import tiny
import torch

from adaras_export import cli
from adaras_export.core.trace_files import write_traces
from adaras_export.core.traces import Trace
from adaras_export.discovery.identify import IdentifyOptions, identify
from adaras_export.errors import RuleError
from adaras_export.modeling.activations import token_means
from adaras_export.modeling.loading import load_model

pytest.importorskip("accelerate")

PLACES = {
    "memory": {"": "cpu"},
    "disk": {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    | {f"model.layers.{layer}": "disk" if layer in (0, 2) else "cpu" for layer in range(tiny.LAYERS)},
    "all on disk": {"": "disk"},
    "auto": "auto",
}


TRACES = [Trace("1", "a", "1+1=", "2", True), Trace("2", "a", "1+1=", "3", False)]


@pytest.mark.parametrize("chunk_tokens", [None, 4])
@pytest.mark.parametrize("places", PLACES)
def test_hooks_see_the_same_where_accelerate_keeps_weights_elsewhere(places, chunk_tokens, folders, stock, tmp_path):
    model, _ = load_model(folders["llama"], device_map=PLACES[places], offload_folder=tmp_path)
    assert any(one.is_meta for one in model.parameters()) == ("disk" in places)
    layers = range(tiny.LAYERS)
    found = token_means(model, tiny.PROMPTS, layers, chunk_tokens=chunk_tokens)
    expected = token_means(stock["llama"], tiny.PROMPTS, layers, chunk_tokens=chunk_tokens)
    assert torch.equal(found.cpu(), expected) or torch.cuda.is_available()
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


def test_gradients_of_weights_on_the_disk_are_refused(folders, tokenizer, bases, tmp_path):
    model, _ = load_model(folders["llama"], device_map=PLACES["disk"], offload_folder=tmp_path)
    found = r"attribution: \d+ tensors of .* are offloaded; expected all in memory"
    with pytest.raises(RuleError, match=found):
        identify(model, tokenizer, TRACES, bases["llama"], IdentifyOptions("attribution", 5))
    assert len(identify(model, tokenizer, TRACES, bases["llama"], IdentifyOptions(keep=5)).neurons) == 5


def test_the_command_line_takes_a_device_map(folders, tmp_path, monkeypatch, capsys):
    write_traces(tmp_path / "traces.jsonl", TRACES)
    monkeypatch.chdir(tmp_path)
    for out, more in (("plain", []), ("mapped", ["--device-map", "auto", "--offload-folder", "weights"])):
        given = ["identify", "traces.jsonl", "-m", str(folders["llama"]), "-o", out, "--keep", "9", *more]
        monkeypatch.setattr("sys.argv", ["adaras-export", *given])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert not end.value.code, capsys.readouterr()
    if not torch.cuda.is_available():
        assert (tmp_path / "plain").read_bytes() == (tmp_path / "mapped").read_bytes()
