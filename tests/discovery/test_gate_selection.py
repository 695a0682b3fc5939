"""Which neurons a gate reads, against scikit-learn."""

import math

import numpy as np
import pytest

from adaras_export.discovery.gate_selection import Moments, Training, f_scores, sizes
from adaras_export.errors import RuleError
from adaras_export.files.memory_mapped import KeptRows

sklearn_selection = pytest.importorskip("sklearn.feature_selection")


@pytest.mark.parametrize("shape", [(4, 1), (9, 30), (50, 3000)])
def test_f_scores_are_those_of_scikit_learn(shape):
    draw = np.random.default_rng(1)
    values = draw.normal(5, 2, shape).astype(np.float32)
    correct = draw.permutation(np.arange(shape[0]) < 2)
    expected, _ = sklearn_selection.f_classif(values.astype(np.float64), correct)
    found = f_scores(Moments.of(values[correct]), Moments.of(values[~correct]))
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_a_constant_column_scores_nothing_and_a_perfect_one_best():
    """Symptom: a neuron that told the classes apart without an exception scored 0. Cause: division by a variance of 0
    was answered with 0, which is right only for a neuron that never varies. Both are exact; no false alarm."""
    correct = np.array([True] * 3 + [False] * 4)
    values = np.stack([np.full(7, 0.1), np.where(correct, 0.1, 0.2), np.arange(7)], axis=1)
    scores = f_scores(Moments.of(values[correct]), Moments.of(values[~correct]))
    assert scores[0] == 0
    assert scores[1] == math.inf
    assert 0 < scores[2] < math.inf


def kept(values):
    """A matrix as rows that were read."""
    count, width = values.shape
    numbers = np.ascontiguousarray(values, np.float32).ravel()
    return KeptRows(numbers, np.arange(count) * width, np.full(count, width))


@pytest.mark.parametrize("cut", [1, 7, 19])
def test_moments_of_parts_merge_to_those_of_the_whole(cut):
    values = np.random.default_rng(2).normal(3, 2, (20, 5)).astype(np.float32)
    merged, whole = Moments.of(values[:cut]).merge(Moments.of(values[cut:])), Moments.of(values)
    assert merged.count == whole.count
    for name in ("mean", "squares", "low", "high"):
        np.testing.assert_allclose(getattr(merged, name), getattr(whole, name), rtol=1e-12)


@pytest.mark.parametrize("numbers", [1, 200, 1 << 22], ids=["row by row", "blocks", "at once"])
def test_a_ranking_knows_only_the_questions_outside_its_fold(numbers, monkeypatch):
    """Whatever number of rows is in memory together."""
    monkeypatch.setattr("adaras_export.discovery.gate_selection._NUMBERS", numbers)
    draw = np.random.default_rng(3)
    values, correct = draw.normal(size=(60, 30)), draw.random(60) < 0.4
    rows = draw.permutation(60)[:40]
    training = Training.of(kept(values), rows, correct[rows], 5, seed=1)
    without, whole = training.rankings(6)
    for ranking, own in [*zip(without, [~held for held in training.folds], strict=True), (whole, slice(None))]:
        scores = sklearn_selection.f_classif(values[rows][own], correct[rows][own])[0]
        assert ranking.tolist() == np.argsort(-scores)[:6].tolist()


def test_a_rare_label_makes_fewer_folds():
    correct = np.arange(30) < 3
    training = Training.of(kept(np.zeros((30, 2))), np.arange(30), correct, 5, seed=0)
    assert len(training.folds) == 3
    assert all((correct & held).sum() == 1 for held in training.folds)


def test_the_numbers_of_features_that_are_tried():
    assert sizes(None, 10**6) == (8, 16, 32, 64, 128)
    assert sizes(None, 40) == (8, 16, 32)
    assert sizes(None, 5) == (5,)
    assert sizes(7, 40) == (7,)


@pytest.mark.parametrize(("features", "message"), [(0, "expected one or more, or auto"), (41, "have 40 neurons")])
def test_an_impossible_number_of_features_is_refused(features, message):
    with pytest.raises(RuleError, match=f"gate: {features} features wanted; .*{message}"):
        sizes(features, 40)
