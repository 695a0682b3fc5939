"""Which cases of a product of axes are run: one deep value everywhere, and pairs of values elsewhere.

Most errors need one value or two that meet (this family, this cache and that start), seldom three. So the deep value of
the first axis, a family, is run with everything, and the others until every pair of values has met in some case.
"""

import itertools
from collections import Counter


def pairwise(deep, *axes, allowed=lambda *case: True):
    """Cases, in the product's order, that hold every pair of two axes' values that an allowed case holds.

    All allowed cases with a value of ``deep`` in the first axis are among them. The rest is chosen greedily: whichever
    case meets most pairs that are missing, and of equals the one whose pairs were met most seldom, then the first.
    """
    cases = [case for case in itertools.product(*axes) if allowed(*case)]
    chosen = [case for case in cases if case[0] in deep]
    met = Counter(pair for case in chosen for pair in pairs(case))
    missing = {pair for case in cases for pair in pairs(case)} - met.keys()
    while missing:
        best = max(cases, key=lambda case: (len(missing & pairs(case)), -sum(met[pair] for pair in pairs(case))))
        chosen.append(best)
        met.update(pairs(best))
        missing -= pairs(best)
    return sorted(chosen, key=cases.index)


def pairs(case):
    """All pairs of two axes' values in a case, each value with the number of its axis."""
    return set(itertools.combinations(enumerate(case), 2))


def in_turn(deep, families, values):
    """Pairs of a family and a value: all values with a deep family, with each other family the next one in turn."""
    values, turn = list(values), itertools.count()
    return [
        (family, value)
        for family in families
        for value in (values if family in deep else [values[next(turn) % len(values)]])
    ]
