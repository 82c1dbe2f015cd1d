"""What a report says about a drawn patient, compared with the phantom hospital's truth."""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np

from evaluation.metrics import Table
from evaluation.pairs import Pair
from phantom.history import DEVICES, FINDINGS, VOCABULARY
from phantom.reports import SIDED, level, read_report
from plumbing.fields import Share, check_fields, shorten
from plumbing.files import read_text

CHANGES = tuple(dict.fromkeys(VOCABULARY["changes"].values()))  # "new", "worse", …


@dataclass
class Truth:
    """The fields of a line of truth.jsonl that are read here."""

    dicom_id: str
    study_id: int | str
    findings: dict[str, dict]
    devices: dict[str, dict]
    changes: dict[str, Literal[CHANGES]]


@dataclass
class Finding:
    severity: Share
    side: str | None


def parse_truth(text: str) -> dict:
    """ValueError that names the field which is wrong."""
    truth = check_fields(dict(json.loads(text)), Truth, "it")
    missing = [field.name for field in fields(Truth) if field.name not in truth]
    if missing:
        raise ValueError(f"it has no {missing[0]}")
    # a name that no hospital draws would not be counted
    for kind, known in (("findings", FINDINGS), ("devices", DEVICES), ("changes", FINDINGS | DEVICES)):
        unknown = [name for name in truth[kind] if name not in known]
        if unknown:
            raise ValueError(f"{kind} has {shorten(unknown[0])}, expected {', '.join(known)}")
    for name, finding in truth["findings"].items():
        truth["findings"][name] = check_fields(dict(severity=None, side=None) | finding, Finding, name)
    return truth


def read_truth(path, pairs: list[Pair]) -> list[dict]:
    """The line of a phantom hospital's truth.jsonl for each pair. ValueError if a line is wrong or missing."""
    lines, text = {}, read_text(path)
    # two keys for each line: pairs may name images, or studies
    for number, line in enumerate(text.splitlines(), 1):
        try:
            truth = parse_truth(line)
        except (ValueError, TypeError, RecursionError) as error:
            problem = f"is no line of a phantom hospital's truth.jsonl ({error})"
            raise ValueError(f"{path} line {number} {problem}") from None
        names = truth["dicom_id"], str(truth["study_id"])
        for name in names:
            if lines.setdefault(name, truth) != truth:
                problem = f"{shorten(name)} has another line before: leave one of them out"
                raise ValueError(f"{path} line {number}: {problem}")

    truths, lost = [], []
    for pair in pairs:
        # by the name of the current image, or by the study
        image = Path(pair.images[0]).stem if pair.images else None
        truths.append(lines.get(image) or lines.get(pair.id))
        if truths[-1] is None:
            lost.append(pair.id)
    if lost:
        raise ValueError(f"{path} has no line for {len(lost):,} of {len(pairs):,} studies (first: {lost[0]})")
    return truths


def truth_statistics(predictions: list[str], truths: list[dict]) -> Table:
    """Returns {score: [N, 2]}, hits and chances, for `metrics.score_of`.

    - precision, recall and F1 of all findings, of all devices, and of each by name
    - side and severity (in three words): of the findings that are present and reported, those described rightly
    - direction of change: of all changes of findings, those reported as such
    """
    scores = ["side", "severity", "direction of change"]
    for group in ("findings", "devices", *FINDINGS, *DEVICES):
        scores += [f"{group} precision", f"{group} recall", f"{group} F1"]
    table = {score: np.zeros((len(truths), 2)) for score in scores}

    for i, (text, truth) in enumerate(zip(predictions, truths, strict=True)):
        report, present = read_report(text), truth["findings"] | truth["devices"]
        for name in FINDINGS | DEVICES:
            # a report may name what is gone: "the nodule has resolved" claims no nodule
            said = report.get(name, {"change": None})
            claimed = name in report and said["change"] not in ("resolved", "removed")
            real = name in present
            hit = claimed and real
            # it counts for itself and for its kind; F1 = 2 hits / (claimed + real)
            for group in (name, "findings" if name in FINDINGS else "devices"):
                table[f"{group} precision"][i] += hit, claimed
                table[f"{group} recall"][i] += hit, real
                table[f"{group} F1"][i] += 2 * hit, claimed + real

            # how a finding is described
            if name in DEVICES:
                continue
            if hit:
                severity = level(present[name]["severity"])
                table["severity"][i] += said["level"] == severity, 1
            if hit and name in SIDED:
                table["side"][i] += said["side"] == present[name]["side"], 1
            if name in truth["changes"]:
                table["direction of change"][i] += said["change"] == truth["changes"][name], 1
    return table


def severity_flips(true: str, other: str, truth: dict) -> tuple[int, int]:
    """Returns (findings that one report calls worse and the other improved, findings whose severity changed)."""
    reports, flipped, changed = (read_report(true), read_report(other)), 0, 0
    for name in FINDINGS:
        if truth["changes"].get(name) in ("worse", "improved"):
            changed += 1
            said = {report[name]["change"] for report in reports if name in report}
            flipped += said == {"worse", "improved"}
    return flipped, changed
