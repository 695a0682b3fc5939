"""The classifiers of a gate and how their settings are chosen, against scikit-learn's pipelines."""

import numpy as np
import pytest

from adaras_export.discovery.gate_fitting import REGULARISATION, by_length, fit_attention, fit_logistic
from adaras_export.discovery.gate_selection import Training
from adaras_export.files.memory_mapped import KeptRows

linear = pytest.importorskip("sklearn.linear_model")
selection = pytest.importorskip("sklearn.model_selection")
features = pytest.importorskip("sklearn.feature_selection")
pipeline = pytest.importorskip("sklearn.pipeline")
preprocessing = pytest.importorskip("sklearn.preprocessing")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    with pytest.importorskip("threadpoolctl").threadpool_limits(1):
        yield


def kept(rows):
    """Rows of numbers as they are kept."""
    widths = np.array([len(row) for row in rows])
    return KeptRows(np.concatenate(rows).astype(np.float32), np.cumsum([0, *widths])[:-1], widths)


def drawn(count, columns, signal, seed=0):
    """Means whose first columns tell right from wrong a little, and labels."""
    draw = np.random.default_rng(seed)
    correct = np.arange(count) % 5 < 2
    values = draw.normal(size=(count, columns)).astype(np.float32)
    values[:, :6] += signal * correct[:, None]
    return values, correct


def test_features_and_regularisation_are_those_of_one_nested_search():
    values, correct = drawn(80, 40, 0.7)
    training = Training.of(kept(list(values)), np.arange(80), correct, 5, seed=2)
    fitted = fit_logistic(training, (3, 9))
    steps = [("best", features.SelectKBest()), ("scale", preprocessing.StandardScaler())]
    whole = pipeline.Pipeline([*steps, ("fit", linear.LogisticRegression(max_iter=1000))])
    grid = {"best__k": [3, 9], "fit__C": REGULARISATION}
    folds = [(np.flatnonzero(~held), np.flatnonzero(held)) for held in training.folds]
    search = selection.GridSearchCV(whole, grid, cv=folds, scoring="neg_log_loss").fit(values.astype(float), correct)
    expected = dict(
        zip(
            [(one["best__k"], one["fit__C"]) for one in search.cv_results_["params"]],
            -search.cv_results_["mean_test_score"],
            strict=True,
        )
    )
    for one in fitted.tried:
        assert one.log_loss == pytest.approx(expected[one.features, one.regularisation], abs=1e-5)
    best = search.best_estimator_
    assert fitted.places.tolist() == np.flatnonzero(best[0].get_support()).tolist()
    z = values[:, fitted.places] @ fitted.weights["hidden_weight"][0] + fitted.weights["hidden_bias"][0]
    np.testing.assert_allclose(1 / (1 + np.exp(-z)), best.predict_proba(values.astype(float))[:, 1], atol=1e-5)


def test_noise_is_not_mistaken_for_a_signal():
    """Symptom: the inner validation told of a good gate where there was nothing to find, and so chose next to no
    regularisation. Cause: features had been chosen on the questions that it held out. Seeded; no false alarm."""
    values, correct = drawn(60, 4000, 0.0)
    fitted = fit_logistic(Training.of(kept(list(values)), np.arange(60), correct, 5, seed=0), (16,))
    base_rate = -(0.4 * np.log(0.4) + 0.6 * np.log(0.6))
    assert min(one.log_loss for one in fitted.tried) > 0.97 * base_rate


@pytest.mark.slow
def test_the_attention_gate_chooses_among_numbers_of_features(monkeypatch):
    monkeypatch.setattr("adaras_export.discovery.gate_fitting._EPOCHS", 150)
    values, correct = drawn(60, 12, 2.5)
    draw, lengths = np.random.default_rng(1), np.arange(60) % 3 + 1
    tokens = [values[row] + 0.1 * draw.normal(size=(lengths[row], 12)) for row in range(60)]
    means = kept([one.mean(0) for one in tokens])
    training, asked = Training.of(means, np.arange(40), correct[:40], 3, seed=0), []

    def read(places):
        asked.append(places.tolist())
        return kept([one[:, places].ravel() for one in tokens])

    fitted = fit_attention(training, (1, 6), read, seed=0)
    assert len(asked) == 1
    losses = {one.features: one.log_loss for one in fitted.tried}
    assert losses[6] < losses[1]
    assert fitted.places.tolist() == [0, 1, 2, 3, 4, 5]
    np.testing.assert_allclose(fitted.features(means, 50), tokens[50][:, :6], rtol=1e-6)


def test_the_length_alone_is_scikit_learns_regression():
    draw = np.random.default_rng(4)
    lengths, correct = draw.integers(5, 90, 50), draw.random(50) < 0.5
    train, asked = np.arange(30), np.arange(30, 50)
    model = pipeline.make_pipeline(preprocessing.StandardScaler(), linear.LogisticRegression())
    expected = model.fit(lengths[:30, None], correct[:30]).predict_proba(lengths[30:, None])[:, 1]
    np.testing.assert_allclose(by_length(lengths, train, correct[:30], asked), expected, atol=1e-6)
