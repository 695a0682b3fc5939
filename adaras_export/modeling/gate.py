"""The gate on a model in memory: its features, its probabilities and its threshold. Trains nothing."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from adaras_export.core.gate import Gate
from adaras_export.core.traces import Prompt
from adaras_export.files.safetensors_record import Array
from adaras_export.modeling.activations import Reading, batches_of, read
from adaras_export.modeling.generation import encode_prompt
from adaras_export.runtime.steering_adaras import SteeringGate


def features_by_batch(
    model: PreTrainedModel, rows: Sequence[Sequence[int]], layer: Array, index: Array, reading: Reading
) -> Iterator[tuple[list[int], list[Array]]]:
    """The features (sorted by layer) at every token: batches of row numbers, and an array (T, F) float32 of each."""
    for indices in batches_of(rows, reading):
        yield indices, features_of(model, [rows[row] for row in indices], layer, index, reading)


def features_of(
    model: PreTrainedModel, rows: Sequence[Sequence[int]], layer: Array, index: Array, reading: Reading
) -> list[Array]:
    """The features (sorted by layer) at every token of each row, (T, F) float32."""
    layers = np.unique(layer).tolist()
    chosen = {number: torch.tensor(index[layer == number]) for number in layers}
    pieces: dict[int, list[Tensor]] = {
        number: [] for number in layers
    }  # of columns, where long rows are read in several

    def keep(at: int, h_BTM: Tensor, _mask_BT: Tensor) -> None:
        pieces[at].append(h_BTM.index_select(-1, chosen[at].to(h_BTM.device)).float().cpu())

    read(model, rows, layers, keep, reading.chunk_tokens)
    features_BTF = torch.cat([torch.cat(pieces[number], dim=1) for number in layers], dim=-1).numpy()
    return [features_TF[: len(row)] for features_TF, row in zip(features_BTF, rows, strict=True)]


def youden_threshold(p_correct: Array, correct: Array) -> float:
    """The threshold t, midway between two scores, that maximises Youden's J of the test "p < t means incorrect".

    J = share of incorrect below t - share of correct below t. The lowest such t, so that ties steer less.
    """
    p_correct = p_correct.astype(np.float32)
    cuts = cuts_of(p_correct)
    wrong, right = p_correct[~correct], p_correct[correct]
    # J times both counts, in integers: fractions would round ties apart.
    j = counts_below(wrong, cuts) * len(right) - counts_below(right, cuts) * len(wrong)
    return float(cuts[int(np.argmax(j))])


def agreeing_threshold(p_correct: Array, is_steered: Array) -> float:
    """The threshold t, midway between two scores, for which "p < t" is most often what ``is_steered`` (N,) says.

    The lowest such t, so that ties steer less.
    """
    p_correct = p_correct.astype(np.float32)
    cuts = cuts_of(p_correct)
    agreeing = counts_below(p_correct[is_steered], cuts) - counts_below(p_correct[~is_steered], cuts)
    return float(cuts[int(np.argmax(agreeing))])


def cuts_of(p_correct: Array) -> Array:
    """0 and a number between every two neighbouring scores, float32, ascending."""
    scores = np.unique(p_correct)
    # Runtimes compare in float32, where the middle of two neighbours would round to either; the upper one separates.
    middle = ((scores[1:].astype(np.float64) + scores[:-1]) / 2).astype(np.float32)
    return np.concatenate([[np.float32(0)], np.where(middle > scores[:-1], middle, scores[1:])])


def counts_below(values: Array, cuts: Array) -> Array:
    """How many values are below each cut."""
    return np.searchsorted(np.sort(values), cuts, side="left")


def is_below(p_correct: Array, threshold: float) -> Array:
    """Which questions a gate steers, (N,) bool."""
    below: Array = p_correct.astype(np.float32) < np.float32(threshold)
    return below


@torch.no_grad()
def probability_of(module: SteeringGate, features_TF: Array) -> float:
    """p(correct) of one prompt, from the gate's features at each of its tokens."""
    features_1TF = torch.tensor(features_TF).unsqueeze(0)
    return float(module(None, (features_1TF, torch.ones(features_1TF.shape[:2])))[2].item())


def gate_probabilities(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    gate: Gate,
    prompts: Sequence[Prompt],
    reading: Reading | None = None,
) -> Array:
    """p(correct) of every prompt, (N,) float32, from one forward pass up to the gate's last layer."""
    rows = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    module, p_correct = gate_module(gate), np.zeros(len(rows), np.float32)
    for indices, features in features_by_batch(model, rows, gate.layer, gate.index, reading or Reading()):
        p_correct[indices] = [probability_of(module, features_TF) for features_TF in features]
    return p_correct


def gate_module(gate: Gate) -> SteeringGate:
    """The classifier of a gate, with its float32 weights."""
    module = SteeringGate(len(gate.layer), len(gate.hidden_bias))
    module.load_state_dict({name: torch.tensor(value) for name, value in gate.weights().items()})
    return module
