"""The drawn hospital's patients: who they are, what they have, and how it changes from study to study.

All of it is a pure function of (seed, patient, number of the study), so any number of workers gives the same bytes.
"""

import hashlib
import json
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path

import numpy as np

from phantom.radiograph import Acquisition, Anatomy, Finding, expose, frontal, lateral

# All that patients can have and reports can say. A patient's finding has one of its sides and one of its places.
VOCABULARY = json.loads(Path(__file__).with_name("vocabulary.json").read_text(encoding="utf-8"))
FINDINGS, DEVICES = VOCABULARY["findings"], VOCABULARY["devices"]
LOWEST_SEVERITY = 0.15
SEVERITY_STEP = (0.20, 0.35)  # how much a severity changes between two studies, if it does
SPLITS = ("train",) * 8 + ("validate", "test")  # of every ten patients
PURPOSES = ("anatomy", "history", "study", "AP", "PA", "LATERAL", "frontal noise", "lateral noise", "report",
            "pair questions", "image questions", "comparison")  # fmt: skip


def generator(seed: int, patient: int, number: int, purpose: str) -> np.random.Generator:
    """The random draws of one study for one purpose. What belongs to the patient has number 0."""
    purpose_id = 1 + PURPOSES.index(purpose)  # not 0: numpy ignores a trailing 0
    return np.random.default_rng([seed, patient, number, purpose_id])


@dataclass(frozen=True)
class State:
    """The hidden state of one study."""

    seed: int
    patient: int
    number: int  # 0 is the patient's first study
    anatomy: Anatomy
    subject_id: int
    study_id: int
    prior: "State | None"
    split: str
    date: date
    time: str  # hhmmss.mmm
    view: str  # of the frontal image: "AP" or "PA"
    images: dict[str, str]  # view -> id of the image; a study may have a "LATERAL" one, too
    present: dict[str, Finding]
    gone: dict[str, Finding]  # what has resolved or been removed since the prior study, as it was then
    changes: dict[str, str]  # of everything present or gone; empty without a prior

    def generator(self, purpose: str) -> np.random.Generator:
        return generator(self.seed, self.patient, self.number, purpose)


def history(seed: int, patient: int) -> list[State]:
    """A patient's studies, first to last."""
    rng = generator(seed, patient, 0, "history")
    anatomy = Anatomy(generator(seed, patient, 0, "anatomy"))
    # 1) how many studies (2.96 on average), and which findings and devices may appear in them
    count = 1 + rng.choice(6, p=(0.20, 0.24, 0.22, 0.16, 0.10, 0.08))
    names = []
    for options, shares in ((FINDINGS, (0.06, 0.40, 0.38, 0.16)), (DEVICES, (0.50, 0.36, 0.14))):
        # shares[n] is the probability of n names
        shuffled = rng.permutation(list(options)).tolist()
        names += shuffled[: rng.choice(len(shares), p=shares)]
    courses = {name: _course(rng, name, count) for name in names}
    # air above fluid would have a level, which is not drawn: keep the two on different sides
    if {"pneumothorax", "pleural effusion"} <= courses.keys():
        side = "left" if courses["pneumothorax"][0].side == "right" else "right"
        courses["pleural effusion"] = [finding._replace(side=side) for finding in courses["pleural effusion"]]

    # 2) the studies, one after the other
    day = date(2110, 1, 1) + timedelta(int(rng.integers(0, 30000)))
    states = []
    for number in range(count):
        rng = generator(seed, patient, number, "study")
        prior = states[-1] if states else None
        before = prior.present if prior else {}
        present = {name: course[number] for name, course in courses.items() if course[number].severity}
        gone = {name: finding for name, finding in before.items() if name not in present}
        changes = changes_between(before, present) if prior else {}
        # a patient with a tube cannot stand up for a PA view
        view = "AP" if "endotracheal tube" in present or rng.random() < 0.4 else "PA"
        images = {view: _image_id(seed, patient, number, "frontal")}
        if view == "PA" and rng.random() < 0.6:
            images["LATERAL"] = _image_id(seed, patient, number, "lateral")
        time = "{:02}{:02}{:02}.{:03}".format(*(int(rng.integers(end)) for end in (24, 60, 60, 1000)))
        # both factors are coprime to 10^7: no two of a million patients share an id, and no two of their studies
        subject_id = 10_000_000 + (32 + 7919 * seed + 6_180_339 * patient) % 10_000_000
        study_id = 50_000_000 + (414_267 + 7919 * seed + 3_819_661 * (8 * patient + number)) % 10_000_000
        ids = {"subject_id": subject_id, "study_id": study_id, "split": SPLITS[patient % 10]}
        findings = {"present": present, "gone": gone, "changes": changes}
        film = {"date": day, "time": time, "view": view, "images": images}
        states.append(State(seed, patient, number, anatomy, prior=prior, **ids, **film, **findings))
        # the next study is soon or much later; patients in bed are seen often
        soon = rng.random() < (0.9 if view == "AP" else 0.35)
        days = rng.integers(1, 8) if soon else rng.integers(8, 400)
        day += timedelta(int(days))
    return states


def changes_between(before: dict[str, Finding], after: dict[str, Finding]) -> dict[str, str]:
    """What has become of everything that is present in one of two studies: first what is there after."""
    names = [*after, *(name for name in before if name not in after)]
    return {name: _change(name, before.get(name), after.get(name)) for name in names}


def _change(name: str, before: Finding | None, after: Finding | None) -> str:
    if before is None:
        return "new"
    if after is None:
        return "removed" if name in DEVICES else "resolved"
    # a device that was away comes back with another severity, which has no meaning
    if before == after or name in DEVICES:
        return "unchanged"
    return "worse" if after.severity > before.severity else "improved"


def _image_id(*key) -> str:
    """40 hexadecimal digits in five groups, as in MIMIC-CXR."""
    digest = hashlib.sha1(repr(key).encode()).hexdigest()
    return "-".join(digest[i : i + 8] for i in range(0, 40, 8))


def _course(rng, name: str, count: int) -> list[Finding]:
    """One finding or device in each of `count` studies; severity 0 means absent.

    The direction of a change hardly depends on the severity before, and a new finding may have any severity: a single
    image says little about the change.
    """
    options = (FINDINGS | DEVICES)[name]
    side = options["sides"][rng.integers(len(options["sides"]))]
    place = options["places"][rng.integers(len(options["places"]))]
    ends = {"pacemaker": 0.0, "endotracheal tube": 0.3, "central line": 0.3}.get(name, 0.18)  # probability per study
    severity, course = 0.0, []
    for _ in range(count):
        # absent: it may appear; present: it may end, or get worse or better
        if not severity:
            severity = rng.uniform(LOWEST_SEVERITY, 1) if rng.random() < 0.5 else 0.0
        elif rng.random() < ends:
            severity = 0.0
        elif name in FINDINGS:
            step, direction = rng.uniform(*SEVERITY_STEP), rng.integers(-1, 2)
            if not LOWEST_SEVERITY <= severity + direction * step <= 1:
                direction = -direction
            severity += direction * step
        severity = round(float(severity), 2)
        course.append(Finding(side, place, severity))
    return course


def picture(state: State, view: str, size: int, aligned: bool = False) -> np.ndarray:
    """One image of a study, uint8 [size, size]; view is "AP", "PA" or "LATERAL".

    aligned=True lays the images of a patient nearly on top of each other, see `Acquisition`.
    """
    draw, noise = (lateral, "lateral noise") if view == "LATERAL" else (frontal, "frontal noise")
    shot = Acquisition(view, state.generator(view), aligned)
    film = draw(state.anatomy, state.present, shot, size)
    return expose(film, shot, state.generator(noise))
