"""What the prior image does: the same questions answered under several priors, and their scores compared."""

from dataclasses import dataclass

import numpy as np

from evaluation.metrics import FLOOR, Interval, Table, differences, intervals, words_of_change
from evaluation.pairs import Pair, statistics_of
from evaluation.truth import severity_flips, truth_statistics

# the words of change that name a direction by themselves, whatever they are said of
WORSE = frozenset(
    """bigger enlarging growing increase increased increasing larger new progression progressive worse worsen worsened
    worsening""".split()  # noqa: SIM905 - to be read
)
BETTER = frozenset(
    """cleared decrease decreased decreasing improved improvement improving reduced removal resolution resolved
    resolving smaller""".split()  # noqa: SIM905
)


def flips(true: str, other: str) -> tuple[int, int]:
    """Returns (direction words of `true` that are reversed in `other`, direction words of `true`); each counts once.

    Direction words are WORSE and BETTER. One is reversed if `other` lacks it and has one of the opposite direction that
    `true` lacks:

        true   "New edema, improved effusion."
        other  "Resolved edema, improved effusion."     new is reversed: (1, 2)
    """
    before, after = words_of_change(true), words_of_change(other)
    gone, come = before - after, after - before
    flipped = 0
    if come & BETTER:
        flipped += len(gone & WORSE)
    if come & WORSE:
        flipped += len(gone & BETTER)
    return flipped, len(before & (WORSE | BETTER))


@dataclass(frozen=True)
class Cell(Interval):
    """A score under one condition. difference: to the true prior, paired, if that has the score too."""

    difference: Interval | None = None


def prior_scores(pairs: dict[str, list[Pair]], truths: list[dict] | None, seed: int) -> dict[str, dict[str, Cell]]:
    """Returns {score: {condition: Cell}}, all intervals over the same resamples of the N studies.

    pairs: {condition: N pairs}, the condition "true" first; truths: N of the phantom hospital's.
    """
    groups, result, tables = {"all": np.ones(len(pairs["true"]), bool)}, {}, {}
    for condition, answered in pairs.items():
        # 1) one table [N, k] for each score; the floor depends on the references alone
        table = statistics_of(answered, label=f"scoring {condition}")
        if truths:
            predictions = [pair.prediction for pair in answered]
            scores = truth_statistics(predictions, truths)
            table |= {key: scores[key] for key in ("findings F1", "devices F1", "direction of change")}
        if condition != "true":
            del table[FLOOR]
            table |= reactions(pairs["true"], answered, truths)

        # 2) intervals of the scores that had a chance
        scores = intervals(table, groups, seed)
        tables[condition] = {key: table[key] for key in table if scores[key]}

        # 3) differences to the true prior
        gaps = {}
        if condition != "true":
            gaps = differences(tables["true"], tables[condition], groups, seed)
        for key in tables[condition]:
            gap = gaps[key]["all"]["difference"] if key in gaps else None
            cell = Cell(**vars(scores[key]["all"]), difference=gap)
            result.setdefault(key, {})[condition] = cell
    return result


def reactions(true: list[Pair], other: list[Pair], truths: list[dict] | None) -> Table:
    """How N reports differ from those under the true prior: rows [N, k] as in `metrics`."""
    texts = [pair.prediction for pair in true]
    others = [pair.prediction for pair in other]
    changed = [[0 if one == two else 100] for one, two in zip(texts, others, strict=True)]
    table = {"reports changed": changed, "directions flipped": list(map(flips, texts, others))}
    if truths:
        table["severity changes turned round"] = list(map(severity_flips, texts, others, truths))
    return {key: np.array(rows, dtype=float) for key, rows in table.items()}
