"""Does it help: tune, evaluate, compare, claim, report."""
