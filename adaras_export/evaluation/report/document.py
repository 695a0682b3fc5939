"""The words of a report: blocks from figures, the same for every format. Claims nothing that `conclusions` does not.

Knows no Markdown and no HTML.
"""

from collections.abc import Sequence

from adaras_export.core.intervals import Estimate
from adaras_export.evaluation.claims import ENOUGH_DRAWS, Outcome
from adaras_export.evaluation.report import charts
from adaras_export.evaluation.report.blocks import (
    Beside,
    Block,
    Cell,
    Code,
    Heading,
    Items,
    Paragraph,
    Report,
    Spans,
    Strong,
    Table,
    Tone,
    Verdict,
)
from adaras_export.evaluation.report.figures import ArmResult, Result, Transfer, sentence
from adaras_export.evaluation.report.reading import Gated, Recorded, Tried
from adaras_export.evaluation.report.transfer_text import across
from adaras_export.evaluation.report.words import chance, points, share, with_interval

_NAMED = 12  # changed questions that are listed

_NO_TEST: tuple[Tone, str] = ("quiet", "No test")
_LABELS: dict[Outcome, tuple[Tone, str]] = {
    "gain": ("good", "Gain shown"),
    "harm": ("bad", "Harm shown"),
    "unchanged": ("quiet", "No effect shown"),
    "uncontrolled": ("quiet", "More right, but no claim: controls are missing"),
    "flipped": ("quiet", "More right, but no claim: the flipped sign does as well"),
    "controls": ("quiet", "More right, but no claim: random neurons do as well"),
    "few draws": ("quiet", "More right, but no claim: too few random draws"),
}


def report(results: Sequence[Result], transfer: Transfer | None, others: Sequence[Tried | Gated]) -> Report:
    """Everything, in the order in which a reader doubts it.

    Args:
        results: one evaluation each.
        transfer: rules across question sets, for several evaluations.
        others: how rules and gates were made.
    """
    blocks: list[Block] = []
    if transfer is not None:
        blocks += across(transfer)
    for result in results:
        if transfer is not None:
            blocks.append(Heading(2, ("Evaluation ", Code(result.recorded.file))))
        blocks += _one(result, level=2 if transfer is None else 3)
    blocks += _made(others)
    blocks += _method(results)
    return Report("Evaluation of a steering rule" if transfer is None else "Steering rules across questions", blocks)


def _one(result: Result, level: int) -> list[Block]:
    tone, label = _NO_TEST if result.recorded.seen else _LABELS[result.judgement.outcome]
    said = sentence(result)
    return [
        Verdict(tone, label, (Code(result.lead.name), f": {said}")),
        Heading(level, ("What was compared",)),
        _compared(result.recorded),
        Heading(level, ("Arms",)),
        *_arms(result),
        *_controls(result, level),
        *_several(result, level),
        Heading(level, ("Questions that changed",)),
        *_changed(result),
        Heading(level, ("What this does not show",)),
        Items(tuple(_limits(result))),
    ]


def _compared(recorded: Recorded) -> Table:
    seen = "not recorded" if recorded.seen is None else "none" if recorded.seen == 0 else str(recorded.seen)
    answers = f"{recorded.answers}, averaged" if recorded.answers > 1 else "1"
    named = () if recorded.question_set is None else (" of ", Code(recorded.question_set))
    rows: list[tuple[str, Spans]] = [
        ("rule", (Code(recorded.rule),)),
        ("questions", (f"{len(recorded.ids)}", *named, f", digest of their ids {recorded.questions_digest[:12]}")),
        ("of these, used to make the rule", (seen,)),
        ("answers to each question", (answers,)),
        ("questions that the gate steers", (share(recorded.steered_share),)),
    ]
    rows += [(key, (Code(words),)) for key, words in recorded.about.items()]
    rows += [(key, ("not recorded",)) for key in ("model", "checker", "sampling") if key not in recorded.about]
    rows.append(("file", (Code(recorded.file),)))
    cells = tuple((Cell.of(key), Cell.of(*spans)) for key, spans in rows)
    return Table("What was compared", ("what", "value"), cells, numeric=False)


def _arms(result: Result) -> list[Block]:
    shown = [arm for arm in result.arms if arm.role != "random"]
    rows = [charts.Row(arm.name, arm.role, arm.accuracy, share(arm.accuracy.value)) for arm in shown]
    off = result.judgement.off.accuracy
    label = f"Accuracy with 95 % intervals: {'; '.join(f'{row.name[:20]} {row.note}' for row in rows)}."
    columns = _columns(result)
    heads = ("arm", "accuracy (95 %)", "points against off (95 %)", "fixed", "broken", "p", "p, Holm", *columns)
    table = Table("Arms", heads, tuple(_arm_row(arm, columns, result) for arm in shown))
    return [Beside(charts.intervals(rows, off, label, signed=False), table), Paragraph((_about_arms(result),))]


def _about_arms(result: Result) -> str:
    tested = result.judgement.tested
    family = (
        f"Holm's correction is over {len(tested)} ways to run the rule ({', '.join(tested)})"
        if len(tested) > 1
        else "one way to run the rule was tested, so Holm's correction changes nothing"
    )
    optional = (
        " Tokens and seconds are means over answers; cut off is the share of answers that reached the limit of tokens."
        if _columns(result)
        else ""
    )
    kind = "McNemar's exact test" if result.recorded.answers == 1 else "an exact paired test that swaps whole questions"
    return (
        f"off is the base model without steering. Fixed and broken count questions against off; p is of {kind}, "
        f"two-sided; {family}. Controls are not corrected: they are no claims.{optional}"
    )


def _columns(result: Result) -> dict[str, str]:
    """Optional columns: their heads, and the fields that they show."""
    wanted = {"tokens": "tokens", "cut off": "cut", "seconds": "seconds"}
    return {head: name for head, name in wanted.items() if any(getattr(arm, name) is not None for arm in result.arms)}


def _arm_row(arm: ArmResult, columns: dict[str, str], result: Result) -> tuple[Cell, ...]:
    lead = arm.name == result.lead.name
    name = Cell.of(Code(arm.name), tone="good" if lead and result.judgement.outcome == "gain" else "plain")
    optional = {"tokens": _one_decimal(arm.tokens), "cut": "" if arm.cut is None else share(arm.cut),
                "seconds": "" if arm.seconds is None else f"{arm.seconds:.3g}"}  # fmt: skip
    return (
        name,
        Cell.of(_accuracy(arm.accuracy)),
        *map(Cell.of, _against(arm)),
        *(Cell.of(optional[field]) for field in columns.values()),
    )


def _one_decimal(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _accuracy(figure: Estimate) -> str:
    return f"{share(figure.value)} ({100 * figure.low:.1f} to {100 * figure.high:.1f})"


def _against(arm: ArmResult) -> tuple[str, str, str, str, str]:
    if arm.change is None:
        return ("",) * 5
    adjusted = "" if arm.adjusted is None else chance(arm.adjusted)
    return with_interval(arm.change), str(arm.fixed), str(arm.broken), chance(arm.p_value), adjusted


def _controls(result: Result, level: int) -> list[Block]:
    draws, lead = result.random, result.lead
    blocks: list[Block] = [Heading(level, ("Random-neuron controls",))]
    if not draws:
        return [*blocks, Paragraph(("None was run, so nothing can be said for these neurons in particular.",))]
    flipped = [arm for arm in result.arms if arm.role == "flipped"]
    compared = [result.arms[0], lead, *flipped]
    lines = [(arm.name, arm.role, arm.accuracy.value) for arm in compared]
    accuracies = [arm.accuracy.value for arm in draws]
    label = (
        f"Accuracy of {len(draws)} random draws, {share(min(accuracies))} to {share(max(accuracies))}, beside "
        + ", ".join(f"{name} {share(value)}" for name, _, value in lines)
        + "."
    )
    rows = tuple(
        (Cell.of(Code(arm.name)), Cell.of(share(arm.accuracy.value)), *map(Cell.of, _against(arm)[:4])) for arm in draws
    )
    table = Table("Random draws", ("draw", "accuracy", "points against off (95 %)", "fixed", "broken", "p"), rows)
    drawing = charts.strip([(arm.name, arm.accuracy.value) for arm in draws], lines, label)
    return [*blocks, Paragraph(_rank(result)), Beside(drawing, table)]


def _rank(result: Result) -> Spans:
    judged, found = result.judgement, result.over_random
    assert found is not None
    enough = (
        "" if len(judged.random) >= ENOUGH_DRAWS else
        f" With fewer than {ENOUGH_DRAWS} draws the rank cannot reach 0.05, whatever the rule does."
    )  # fmt: skip
    against = (
        ""
        if result.over_flipped is None
        else f" Against the flipped sign: {points(result.over_flipped[0])}, p = {chance(result.over_flipped[1])}."
    )
    return (
        "Each draw takes as many other neurons of the same layers, with random signs and the same norm, and is steered "
        "like ",
        Code(judged.arm.name),
        f". {judged.as_good} of {len(judged.random)} reach what the rule reaches: ",
        Strong(f"rank test p = {chance(judged.rank_p)}"),
        f".{enough} The rule is {points(found)} from the mean of these draws.{against}",
    )


def _several(result: Result, level: int) -> list[Block]:
    if not result.passes:
        return []
    name, answers = result.lead.name, result.recorded.answers
    series = [
        ("off", "off", [(k, off.value) for k, off, _ in result.passes]),
        (name, "rule", [(k, own.value) for k, _, own in result.passes]),
    ]
    last = result.passes[-1]
    label = f"pass@k from k = 1 to {answers}: off reaches {share(last[1].value)}, {name} {share(last[2].value)}."
    rows = tuple((Cell.of(str(k)), Cell.of(_accuracy(off)), Cell.of(_accuracy(own))) for k, off, own in result.passes)
    table = Table("pass@k", ("k", "off (95 %)", f"{name} (95 %)"), rows)
    return [
        Heading(level, (f"{answers} answers to each question",)),
        Paragraph(
            (
                f"The accuracies above are mean@{answers}. pass@k is the chance that one of k answers is right; "
                "intervals are over questions.",
            )
        ),
        Beside(charts.curves(series, label), table),
    ]


def _changed(result: Result) -> list[Block]:
    items = []
    for fixed, word in ((True, "Fixed"), (False, "Broken")):
        ids = result.ids_of_changed(fixed=fixed)
        names = [part for one in ids[:_NAMED] for part in (", ", Code(one))][1:]
        more = f", and {len(ids) - _NAMED} more" if len(ids) > _NAMED else ""
        items.append((Strong(f"{word}, {len(ids)}"), ": " if ids else "", *names, f"{more}."))
    return [Items(tuple(items))]


def _limits(result: Result) -> list[Spans]:
    recorded, judged = result.recorded, result.judgement
    found: list[Spans] = [
        (
            f"Small effects: with {len(recorded.ids)} questions and as many changed verdicts, a true difference of "
            f"{100 * judged.detectable:.1f} points is found four times in five. An interval around 0 is no proof of "
            "equality.",
        ),
        ("Other questions, models, prompts or numbers of tokens: intervals are over questions of this set alone.",),
    ]
    if recorded.seen is None:
        found.append(("Whether the rule was made with some of these questions: that was not recorded.",))
    if recorded.answers == 1:
        found.append(("What sampling would do: there is one answer to each question and arm.",))
    kept = {"length": recorded.tokens, "cut-off answers": recorded.cut, "latency": recorded.seconds}
    if missing := [what for what, values in kept.items() if not values]:
        longer = " Gains from longer answers would not be noticed." if "length" in missing else ""
        found.append((f"Not recorded: {', '.join(missing)}.{longer}",))
    return found


def _made(others: Sequence[Tried | Gated]) -> list[Block]:
    blocks: list[Block] = []
    for one in others:
        if isinstance(one, Tried):
            blocks += _tried(one)
        else:
            rows = tuple((Cell.of(Code(key)), Cell.of(Code(words))) for key, words in one.figures.items())
            blocks += [
                Heading(2, ("The gate, from ", Code(one.file))),
                Table("Gate", ("what", "value"), rows, numeric=False),
            ]
    return blocks


def _tried(tried: Tried) -> list[Block]:
    rows = tuple(
        (Cell.of(Code(name)), Cell.of(str(count)), Cell.of(share(right))) for name, count, right in tried.settings
    )
    return [
        Heading(2, ("Settings that were tried, from ", Code(tried.file))),
        Paragraph(
            (
                f"{len(rows) - 1} settings on validation questions led to rule ",
                Code(tried.rule),
                ". The best of several looks better than it is; only the fresh questions above are a test.",
            )
        ),
        Table("Settings", ("setting", "questions", "accuracy"), rows),
    ]


def _method(results: Sequence[Result]) -> list[Block]:
    several = any(result.recorded.answers > 1 for result in results)
    items: list[Spans] = [
        (Strong("Accuracy"), ": Wilson's score interval (1927), 95 %."),
        (
            Strong("Differences"),
            ": paired by question; BCa bootstrap over questions (Efron 1987), 9999 resamples, seed 0; Tango's interval "
            "(1998) where fewer than ten changed.",
        ),
        (Strong("p"), ": McNemar's exact test, two-sided; Holm's correction (1979)."),
        (Strong("Rank test"), ": (1 + draws that do as well) / (1 + draws)."),
        (
            Strong("A gain is claimed"),
            " where the corrected p is below 0.05, the rank test at most 0.05, the flipped sign reaches less, and no "
            "question was used to make the rule.",
        ),
    ]
    if several:
        items[0] = (
            Strong("Accuracy"),
            ": of several answers the mean, BCa bootstrap over questions; else Wilson (1927).",
        )
        items.append((Strong("pass@k"), ": 1 - C(n - c, k) / C(n, k) with c of n answers right (Chen et al. 2021)."))
        items[2] = (
            Strong("p"),
            ": exact test of all ways to swap the arms question by question (for one answer, McNemar's), two-sided; "
            "Holm's correction (1979).",
        )
    return [Heading(2, ("How figures are made",)), Items(tuple(items))]
