"""The selection of cases: no pair of values is lost, the deep value is whole, and much is left out."""

import itertools

from pairwise import in_turn, pairs, pairwise

FAMILIES, MODES, RULES, CACHES = "abcdef", range(7), "uvwxy", (True, False)


def pairs_of(cases):
    return set().union(*map(pairs, cases))


def test_every_pair_is_met_and_the_deep_family_is_whole():
    everything = set(itertools.product(FAMILIES, MODES, RULES, CACHES))
    chosen = pairwise("a", FAMILIES, MODES, RULES, CACHES)
    assert pairs_of(chosen) == pairs_of(everything)
    assert {case for case in everything if case[0] == "a"} < set(chosen) < everything
    assert len(chosen) == len(set(chosen)) == len(MODES) * (len(RULES) * len(CACHES) + len(FAMILIES) - 1)


def test_what_is_not_allowed_is_not_chosen_and_costs_no_other_pair():
    def allowed(family, mode, rule):
        return (mode, rule) != (3, "v") and (family, rule) != ("c", "u")

    everything = [case for case in itertools.product(FAMILIES, MODES, RULES) if allowed(*case)]
    chosen = pairwise("", FAMILIES, MODES, RULES, allowed=allowed)
    assert set(chosen) < set(everything)
    assert pairs_of(chosen) == pairs_of(everything)


def test_the_selection_is_the_same_every_time_and_spreads_over_all_values():
    chosen = pairwise("a", FAMILIES, MODES, RULES)
    assert chosen == pairwise("a", FAMILIES, MODES, RULES)
    for family in FAMILIES[1:]:
        assert {rule for name, _, rule in chosen if name == family} == set(RULES)


def test_in_turn_gives_every_family_one_value_and_the_deep_one_all():
    chosen = in_turn("b", FAMILIES, "uvw")
    assert chosen == [("a", "u"), ("b", "u"), ("b", "v"), ("b", "w"), ("c", "v"), ("d", "w"), ("e", "u"), ("f", "v")]
