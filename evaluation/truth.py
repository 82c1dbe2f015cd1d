"""What a report tells of a drawn patient, against the phantom hospital's truth."""

import numpy as np

from phantom.history import DEVICES, FINDINGS
from phantom.reports import SIDED, level, read_report


def truth_statistics(predictions: list[str], truths: list[dict]) -> dict[str, np.ndarray]:
    """{score: [N, 2], hits and chances}.

    Precision, recall and F1 of findings, of devices, and of each. Of findings that are there and told: side, where the
    hospital names one, and severity in its three words. Direction: of all changes of findings, those told so.
    """
    groups = ("findings", "devices", *FINDINGS, *DEVICES)
    scores = [f"{group} {kind}" for group in groups for kind in ("precision", "recall", "F1")]
    rows = {score: np.zeros((len(truths), 2)) for score in ("side", "severity", "direction of change", *scores)}
    for i, (text, truth) in enumerate(zip(predictions, truths, strict=True)):
        report, there = read_report(text), truth["findings"] | truth["devices"]
        for name in FINDINGS | DEVICES:
            told, real = report.get(name, {}), name in there
            said = bool(told) and told["change"] not in ("resolved", "removed")
            for group in (name, "findings" if name in FINDINGS else "devices"):
                rows[f"{group} precision"][i] += said and real, said
                rows[f"{group} recall"][i] += said and real, real
                rows[f"{group} F1"][i] += 2 * (said and real), said + real
            if name in FINDINGS and said and real:
                rows["severity"][i] += told["level"] == level(there[name]["severity"]), 1
                rows["side"][i] += name in SIDED and told["side"] == there[name]["side"], name in SIDED
            if name in FINDINGS and name in truth["changes"]:
                rows["direction of change"][i] += told.get("change") == truth["changes"][name], 1
    return rows


def severity_flips(true: str, other: str, truth: dict) -> tuple[int, int]:
    """Of the findings whose severity has changed, those called worse in one report and improved in the other; all."""
    changed = [name for name in FINDINGS if truth["changes"].get(name) in ("worse", "improved")]
    one, two = ({name: said["change"] for name, said in read_report(text).items()} for text in (true, other))
    return sum({one.get(name), two.get(name)} == {"worse", "improved"} for name in changed), len(changed)
