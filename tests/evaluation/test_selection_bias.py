"""Selection bias: the p-value of the best of many is uniform by chance and small for a real gain; gains shrink."""

import numpy as np

from adaras_export.core.intervals import paired_test
from adaras_export.evaluation.selection_bias import selection_bias


def by_chance(seed, settings=20, questions=100):
    """Differences of settings that fix as often as they break."""
    random = np.random.default_rng(seed)
    return random.choice([-1, 0, 1], p=[0.1, 0.8, 0.1], size=(settings, questions))


def whole(differences):
    return selection_bias(differences, np.ones(differences.shape, bool), int(differences.sum(axis=1).argmax()))


def test_the_best_of_twenty_lucky_settings_is_no_finding():
    p_values = [whole(by_chance(seed)).p_value for seed in range(40)]
    assert np.mean(np.array(p_values) < 0.1) <= 0.25
    assert 0.3 < np.mean(p_values) < 0.7


def test_a_test_of_the_winner_alone_would_believe_luck():
    """What the permutation is for: McNemar's test of the best of twenty is not uniform by chance."""
    alone = [max(by_chance(seed), key=np.sum) for seed in range(40)]
    naive = [paired_test(best > 0, best < 0)[2] for best in alone]
    assert np.mean(np.array(naive) < 0.1) > 0.4


def test_a_real_gain_among_lucky_settings_is_found():
    differences = by_chance(0)
    differences[7, :40] = 1
    found = whole(differences)
    assert (found.settings, found.p_value < 0.001) == (20, True)


def test_one_setting_has_the_p_value_of_the_one_sided_sign_test():
    differences = np.zeros((1, 50), dtype=int)
    differences[0, :8], differences[0, 8:10] = 1, -1
    assert abs(whole(differences).p_value - 56 / 1024) < 0.02  # P(8 or more of 10)


def test_gains_on_fresh_questions_are_expected_to_be_smaller_than_the_best_one_seen():
    gains = [(by_chance(seed).mean(axis=1).max(), whole(by_chance(seed)).fresh_gain) for seed in range(10)]
    seen, fresh = np.mean(gains, axis=0)
    assert seen > 0.06
    assert fresh < seen / 2


def test_nothing_changed_is_p_of_one_and_no_gain():
    found = whole(np.zeros((5, 30), dtype=int))
    assert (found.p_value, found.fresh_gain) == (1.0, 0.0)


def test_stopped_settings_count_among_the_tried_ones():
    differences, answered = by_chance(3), np.ones((20, 100), dtype=bool)
    best = int(differences.sum(axis=1).argmax())
    alone = selection_bias(differences[[best]], answered[[best]], 0).p_value
    answered[[one for one in range(20) if one != best], 30:] = False
    stopped = selection_bias(np.where(answered, differences, 0), answered, best)
    assert stopped.p_value > 3 * alone
    assert stopped.settings == 20


def test_one_question_is_enough():
    assert whole(np.ones((2, 1), dtype=int)).fresh_gain == 1.0
