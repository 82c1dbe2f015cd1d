"""What the prior image does: the same questions answered under several priors, and their scores compared."""

import csv
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from evaluation.metrics import FLOOR, Interval, Table, differences, intervals, statistics, words_of_change
from evaluation.truth import severity_flips, truth_statistics
from plumbing.cli import print_table, progress
from plumbing.files import atomic

# the words of change that name a direction by themselves, whatever they are said of
WORSE = frozenset(
    """bigger enlarging growing increase increased increasing larger new progression progressive worse worsen worsened
    worsening""".split()  # noqa: SIM905 - to be read
)
BETTER = frozenset(
    """cleared decrease decreased decreasing improved improvement improving reduced removal resolution resolved
    resolving smaller""".split()  # noqa: SIM905
)


class Flips(NamedTuple):
    """Direction words of one report: how many are reversed in another report, and how many there are."""

    flipped: int
    words: int


def flips(true: str, other: str) -> Flips:
    """Count the direction words (WORSE, BETTER) of `true` that are reversed in `other`; each word counts once.

    A word is reversed if `other` lacks it and has a word of the opposite direction that `true` lacks:

        true   "New edema, improved effusion."
        other  "Resolved edema, improved effusion."     new is reversed: Flips(flipped=1, words=2)
    """
    before, after = words_of_change(true), words_of_change(other)
    gone, come = before - after, after - before
    flipped = 0
    if come & BETTER:
        flipped += len(gone & WORSE)
    if come & WORSE:
        flipped += len(gone & BETTER)
    return Flips(flipped, len(before & (WORSE | BETTER)))


@dataclass(frozen=True)
class Cell(Interval):
    """A score under one condition. difference: to the true prior, paired, if that has the score too."""

    difference: Interval | None = None


def prior_scores(texts: dict, references: list[str], truths: list[dict] | None, seed: int) -> dict:
    """Returns {score: {condition: Cell}}, all intervals over the same resamples of the N studies.

    texts: {condition: N reports}, the condition "true" first; references: N; truths: N of the phantom hospital's.
    """
    groups = {"all": np.ones(len(references), bool)}
    result, true_table = {}, None
    for condition, predictions in texts.items():
        # 1) one table [N, k] for each score; the floor depends on the references alone
        table = statistics(predictions, references, show=progress(f"scoring {condition}"))
        if truths:
            scores = truth_statistics(predictions, truths)
            table |= {key: scores[key] for key in ("findings F1", "devices F1", "direction of change")}
        if condition != "true":
            del table[FLOOR]
            table |= reactions(texts["true"], predictions, truths)

        # 2) intervals, and differences to the true prior, of the scores that had a chance
        scores = {key: found["all"] for key, found in intervals(table, groups, seed).items() if found}
        table = {key: table[key] for key in scores}
        gaps = differences(true_table, table, groups, seed) if true_table else {}
        true_table = true_table or table
        for key, interval in scores.items():
            difference = gaps[key]["all"].difference if key in gaps else None
            result.setdefault(key, {})[condition] = Cell(**vars(interval), difference=difference)
    return result


def reactions(true: list[str], other: list[str], truths: list[dict] | None) -> Table:
    """How N reports differ from those under the true prior: rows [N, k] as in `metrics`."""
    pairs = list(zip(true, other, strict=True))
    table = {"reports changed": [[0 if one == two else 100] for one, two in pairs]}
    table["directions flipped"] = [flips(one, two) for one, two in pairs]
    if truths:
        turned = map(severity_flips, true, other, truths)
        table["severity changes turned round"] = list(turned)
    return {key: np.array(rows, dtype=float) for key, rows in table.items()}


def print_prior(scores: dict, conditions: list[str], words: int):
    """Print the result of `prior_scores`, a column for each condition; words: direction words under the true prior."""
    lines = [["", *conditions]]
    for key, cells in scores.items():
        lines.append([key, *(cells.get(condition, "") for condition in conditions)])
        gaps = {condition: cell.difference for condition, cell in cells.items() if cell.difference}
        if gaps:
            signed = {condition: gap.format("+") for condition, gap in gaps.items()}
            lines.append(["  minus true", *(signed.get(condition, "") for condition in conditions)])
    print_table(lines)
    print(f"directions flipped: share of the {words:,} words of direction in the reports under true that the other")
    print("report lacks while it has a word of the opposite direction that the first lacks")
    print(f"worse: {', '.join(sorted(WORSE))}\nbetter: {', '.join(sorted(BETTER))}")


def write_prior_csv(path, name: str, scores: dict):
    """Write one row for each score and condition."""
    ends = ["value", "low", "high"]
    with atomic(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["Model Name", "score", "prior", *ends, *(f"difference {end}" for end in ends)])
        for key, cells in scores.items():
            for condition, cell in cells.items():
                gap = cell.difference or Interval(None)
                writer.writerow([name, key, condition, cell.value, cell.low, cell.high, gap.value, gap.low, gap.high])
