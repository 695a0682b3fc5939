"""Running sums: an order-free merge, and means that say what they average."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from adaras_export.core.base_model import BaseModel
from adaras_export.core.neuron_stats import AttributionStats, NeuronStats
from adaras_export.errors import RuleError, TraceError
from adaras_export.files import safetensors_record

BASE = BaseModel("tiny", "llama", 2, 3, 4, fingerprint="ab" * 32)
SHAPE = (2, 3)
NUMBERS = st.floats(-1e3, 1e3, width=32)


def means(count):
    return hnp.arrays(np.float32, (count, *SHAPE), elements=NUMBERS)


@st.composite
def stats(draw, name, contrast="within_question"):
    """Statistics of one to three questions whose digests begin with ``name``."""
    found = NeuronStats.empty(BASE, contrast=contrast)
    for number in range(draw(st.integers(1, 3))):
        correct, incorrect = draw(means(draw(st.integers(1, 3)))), draw(means(draw(st.integers(1, 3))))
        found = found.update(f"{name}{number}", correct, incorrect)
    return found


@settings(max_examples=15)  # the sums themselves are tested in test_exact.py
@given(stats("a"), stats("b"), stats("c"))
def test_merging_gives_the_same_bytes_in_any_order_or_grouping(a, b, c):
    assert a.merge(b) == b.merge(a)
    assert a.merge(b).merge(c) == a.merge(b.merge(c)) == c.merge(a).merge(b)


@settings(max_examples=15)
@given(stats("a"), stats("b", "unpaired"))
def test_the_empty_statistics_are_neutral(a, b):
    for one in (a, b):
        empty = NeuronStats.empty(BASE, contrast=one.contrast)
        assert one.merge(empty) == one
        assert empty.merge(one) == one


@given(hnp.arrays(np.float64, (3, *SHAPE), elements=NUMBERS))
def test_attribution_sums_do_not_depend_on_order_either(gradients):
    empty = AttributionStats.empty(BASE)
    parts = [empty.update(f"{number}", gradient) for number, gradient in enumerate(gradients)]
    assert parts[0].merge(parts[1]).merge(parts[2]) == parts[2].merge(parts[0]).merge(parts[1])
    np.testing.assert_allclose(parts[0].merge(parts[1]).merge(parts[2]).mean(), gradients.mean(0), atol=1e-9)


@settings(max_examples=15)
@given(means(2), means(3), means(2), means(1))
def test_the_halves_are_the_questions_of_odd_and_of_even_digests(a, b, c, d):
    odd = NeuronStats.empty(BASE).update("a1", a, b).update("b3", b, c)
    even = NeuronStats.empty(BASE).update("c2", c, d)
    plain = {name: value for name, value in vars(odd).items() if not name.startswith("first_half_")}
    assert odd.merge(even).halves() == (NeuronStats(**bare(plain)), NeuronStats(**bare(vars(even))))
    assert even.halves()[0].trace_count == 0


def bare(values):
    """Fields of statistics without what is only of their first half."""
    rests = {name: rest for name, rest in values["rests"].items() if not name.startswith("first_half_")}
    return {**{name: value for name, value in values.items() if not name.startswith("first_half_")}, "rests": rests}


def test_a_file_of_an_earlier_release_averaged_all_tokens_and_knows_no_halves(tmp_path):
    ones = np.ones((1, *SHAPE))
    found = NeuronStats.empty(BASE).update("a", 3 * ones, ones)
    names = ["correct_sum", "incorrect_sum", "difference_square_sum", "trace_sum", "trace_square_sum"]
    record = {name: value for name, value in found._record().items() if name in EARLIER}
    safetensors_record.save_file(tmp_path / "old", found.kind, {name: getattr(found, name) for name in names}, record)
    old = NeuronStats.load(tmp_path / "old")
    assert (old.tokens, old.halves()[0].trace_count) == ("all", 0)
    assert [half.tolist() for half in old.means()] == [half.tolist() for half in found.means()]
    old.merge(NeuronStats.empty(BASE).update("b", ones, ones)).save(tmp_path / "new")
    assert NeuronStats.load(tmp_path / "new").trace_count == 4


EARLIER = {"version", "base", "questions", "correct_count", "incorrect_count", "trace_count", "contrast"}


def test_statistics_of_other_tokens_are_not_merged():
    with pytest.raises(RuleError, match=r"tokens differs .all and completion.; expected parts of one kind"):
        NeuronStats.empty(BASE).merge(NeuronStats.empty(BASE, tokens="completion"))


def test_the_rest_of_a_sum_that_does_not_exist_is_refused():
    with pytest.raises(RuleError, match="strange_rest belongs to no sum"):
        NeuronStats.empty(BASE).__class__(BASE, (), *[np.zeros(SHAPE)] * 5, rests={"strange": np.ones(SHAPE)})


def test_every_question_weighs_the_same_whatever_its_number_of_traces():
    ones = np.ones((1, *SHAPE))
    found = NeuronStats.empty(BASE).update("a", ones, 0 * ones).update("b", np.repeat(5 * ones, 9, 0), 2 * ones)
    correct, incorrect = found.means()
    assert np.array_equal(correct, np.full(SHAPE, 3.0))  # (1 + 5) / 2, not (1 + 9 * 5) / 10
    assert np.array_equal(incorrect, np.ones(SHAPE))
    assert np.array_equal(found.difference_square_sum, np.full(SHAPE, 1.0 + 9.0))
    assert (found.correct_count, found.incorrect_count, found.trace_count) == (2, 2, 12)


def test_unpaired_every_trace_weighs_the_same_and_a_question_may_lack_a_class():
    ones, none = np.ones((1, *SHAPE)), np.zeros((0, *SHAPE))
    found = NeuronStats.empty(BASE, contrast="unpaired").update("a", np.repeat(ones, 3, 0), none)
    found = found.update("b", 5 * ones, 2 * ones)
    assert np.array_equal(found.means()[0], np.full(SHAPE, 8 / 4))
    assert np.array_equal(found.means()[1], np.full(SHAPE, 2.0))
    assert (found.correct_count, found.incorrect_count) == (4, 1)


@given(means(4), means(3))
def test_the_deviation_is_that_of_all_traces(correct, incorrect):
    found = NeuronStats.empty(BASE).update("a", correct, incorrect)
    expected = np.concatenate([correct, incorrect]).astype(np.float64).std(0)
    np.testing.assert_allclose(found.deviation(), expected, atol=1e-4)  # a difference of squares of up to 1e6


def test_sums_are_float64_so_that_a_million_traces_do_not_drown_one():
    large = np.full((1, *SHAPE), 1e8, np.float32)
    found = NeuronStats.empty(BASE).update("a", large, large).update("b", large * 0 + 1, large * 0 + 1)
    assert found.correct_sum.dtype == np.float64
    assert found.correct_sum[0, 0] == 1e8 + 1


@pytest.mark.parametrize("sizes", [(0, 2), (2, 0)])
def test_a_question_with_one_outcome_is_refused_within_questions(sizes):
    parts = [np.zeros((size, *SHAPE)) for size in sizes]
    with pytest.raises(TraceError, match=f"{sizes[0]} correct and {sizes[1]} incorrect traces; expected both"):
        NeuronStats.empty(BASE).update("a", *parts)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_activations_that_are_not_finite_are_refused_by_question_and_layer(value):
    bad = np.zeros((2, *SHAPE))
    bad[0, 1, 2] = value
    with pytest.raises(TraceError, match=r"question a: activations of layers \[1\] are NaN or infinite; .* float32"):
        NeuronStats.empty(BASE).update("a", bad, np.zeros((1, *SHAPE)))


def test_means_without_a_class_are_refused():
    ones, none = np.ones((1, *SHAPE)), np.zeros((0, *SHAPE))
    for parts, label in (((ones, none), "incorrect"), ((none, ones), "correct")):
        found = NeuronStats.empty(BASE, contrast="unpaired").update("a", *parts)
        with pytest.raises(TraceError, match=f"traces: none is {label}"):
            found.means()


def test_a_question_counts_once():
    ones = np.ones((1, *SHAPE))
    found = NeuronStats.empty(BASE).update("a", ones, ones)
    with pytest.raises(TraceError, match="question a is in both parts; expected disjoint questions"):
        found.update("a", ones, ones)


def test_statistics_of_another_model_or_contrast_are_not_merged():
    one = NeuronStats.empty(BASE)
    with pytest.raises(RuleError, match=r"fingerprint cdcd.* \(expected abab"):
        one.merge(NeuronStats.empty(replace(BASE, fingerprint="cd" * 32)))
    with pytest.raises(RuleError, match=r"contrast differs .within_question and unpaired.; expected parts of one kind"):
        one.merge(NeuronStats.empty(BASE, contrast="unpaired"))


def test_sums_of_another_shape_or_with_nan_are_not_born():
    good = {name: np.zeros(SHAPE) for name in NeuronStats._sums}
    with pytest.raises(RuleError, match=r"correct_sum has shape \(3, 2\); expected \(2, 3\) of tiny"):
        NeuronStats(BASE, (), **{**good, "correct_sum": np.zeros((3, 2))})
    with pytest.raises(RuleError, match="trace_sum holds NaN or infinity"):
        NeuronStats(BASE, (), **{**good, "trace_sum": np.full(SHAPE, np.nan)})


def test_the_standard_error_is_that_of_a_mean_over_questions():
    gradients = np.random.default_rng(0).normal(size=(5, *SHAPE))
    found = AttributionStats.empty(BASE)
    for number, gradient in enumerate(gradients):
        found = found.update(f"{number}", gradient)
    np.testing.assert_allclose(found.standard_error(), gradients.std(0, ddof=1) / np.sqrt(5), atol=1e-12)


def test_the_standard_error_of_one_question_is_infinite():
    assert np.isinf(AttributionStats.empty(BASE).update("0", np.ones(SHAPE)).standard_error()).all()


def test_the_split_half_cosine_compares_questions_of_odd_and_even_digests():
    draw = np.random.default_rng(0)
    odd, even = draw.normal(size=(2, *SHAPE))
    found = AttributionStats.empty(BASE).update("0b", odd).update("0a", even)
    expected = (odd * even).sum() / np.linalg.norm(odd) / np.linalg.norm(even)
    assert found.split_half_cosine() == pytest.approx(expected)
    assert np.isnan(AttributionStats.empty(BASE).update("0b", odd).split_half_cosine())


def test_a_gradient_that_is_not_finite_is_refused():
    with pytest.raises(TraceError, match="question 0: its gradient is NaN or infinite"):
        AttributionStats.empty(BASE).update("0", np.full(SHAPE, np.nan))


def test_the_mean_of_no_question_is_refused():
    with pytest.raises(TraceError, match="no question has both correct and incorrect traces"):
        AttributionStats.empty(BASE).mean()
