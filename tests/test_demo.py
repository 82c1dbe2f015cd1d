"""The trained phantom in assets/ against the truth of drawn patients: `make demo`, findings, and change over time."""

import functools
import re
import shlex

import numpy as np
from conftest import ROOT
from PIL import Image

import sample
from assets.draw import DEMO_PATIENT, DEMO_STUDY
from data import Study
from evaluation import truth as truth_scores
from model import Libra
from phantom.history import history, picture
from phantom.hospital import truth_of
from phantom.reports import read_report

QUERY = "Provide a detailed description of the findings in the radiology image."  # sample.py's default


@functools.cache
def held_out(count=60):
    """(truth, image, prior image) of studies with a prior, of patients that no training has seen."""
    studies = []
    for patient in range(9, 10 * count, 10):
        states = history(0, patient)
        images = [Image.fromarray(picture(state, state.view, 96)) for state in states]
        studies += zip(map(truth_of, states[1:]), images[1:], images, strict=False)
    assert all(truth["split"] == "test" for truth, _, _ in studies)
    return studies[:count]


@functools.cache
def reports(condition):
    """What the model writes about them: with the "true" prior, "without" one, or with the images "exchanged"."""
    libra = Libra.from_pretrained(ROOT / "assets" / "phantom", device="cpu")
    studies = []
    for _, image, prior in held_out():
        pair = {"true": (image, prior), "without": (image, None), "exchanged": (prior, image)}[condition]
        studies.append(Study(*pair, query=QUERY))
    return [output[0].text for output in sample.generate(libra, studies, max_new_tokens=128)]


def scores(condition, column):
    """Hits and chances in a column of the truth's scores."""
    return truth_scores.truth_statistics(reports(condition), [truth for truth, _, _ in held_out()])[column].sum(0)


def test_the_model_is_small():
    assert sum(file.stat().st_size for file in (ROOT / "assets" / "phantom").rglob("*")) < 12e6


def test_the_demo_tells_the_change_and_its_opposite_with_the_images_exchanged(capsys):
    changes = []
    for command in re.findall(r"^\t\.venv/bin/python sample\.py (.+)$", (ROOT / "Makefile").read_text(), re.M):
        arguments = [str(ROOT / word) if word.startswith("assets/") else word for word in shlex.split(command)]
        assert sample.main(sample.parse(arguments)) == 0
        changes.append({name: said["change"] for name, said in read_report(capsys.readouterr().out).items()})
    truth = history(0, DEMO_PATIENT)[DEMO_STUDY].changes
    opposite = {"worse": "improved", "improved": "worse"}
    assert changes == [truth, {name: opposite[change] for name, change in truth.items()}]


def test_findings_are_seen():
    hits, chances = scores("true", "findings F1")
    assert hits / chances > 0.8


def test_change_is_read_from_the_prior():
    hits, without = (scores(condition, "direction of change")[0] for condition in ("true", "without"))
    assert hits > 1.5 * max(without, 1)
    truths = [truth for truth, _, _ in held_out()]
    flips = map(truth_scores.severity_flips, reports("true"), reports("exchanged"), truths)
    turned, changes = np.sum(list(flips), axis=0)
    assert turned > 0.4 * changes  # a model that ignores the prior turns none
