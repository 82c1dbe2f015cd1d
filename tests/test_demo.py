"""The phantom model in assets: what `make demo` shows, and that it reads findings and time."""

import functools
import re
import shlex

from conftest import ROOT
from PIL import Image

import sample
from data import Study
from evaluation import truth as truth_scores
from model import Libra
from phantom.hospital import history, picture, read_report, truth_of

QUERY = "Provide a detailed description of the findings in the radiology image."  # sample.py's own


@functools.cache
def phantom():
    return Libra.from_pretrained(ROOT / "assets" / "phantom", device="cpu")


@functools.cache
def held_out(count=60):
    """(state, its image, its prior image) of studies with a prior, of patients that no training has seen."""
    found = []
    for patient in range(9, 10 * count, 10):
        states = history(0, patient)
        images = [Image.fromarray(picture(state, state.view, 96)) for state in states]
        found += zip(states[1:], images[1:], images, strict=False)
    assert all(state.split == "test" for state, *_ in found)
    return found[:count]


def write(studies):
    return [output[0].text for output in sample.generate(phantom(), studies, max_new_tokens=128)]


@functools.cache
def reports(condition):
    images = {"true": lambda c, p: (c, p), "dummy": lambda c, p: (c, None), "reversed": lambda c, p: (p, c)}[condition]
    return write([Study(*images(current, prior), query=QUERY) for _, current, prior in held_out()])


def test_it_is_small_and_says_what_it_is():
    files = [file for file in (ROOT / "assets" / "phantom").rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 12e6
    assert "phantom" in (ROOT / "assets" / "phantom" / "README.md").read_text()


def test_the_demo_tells_the_change_and_with_the_images_exchanged_its_opposite(capsys):
    makefile = (ROOT / "Makefile").read_text()
    said = []
    for command in re.findall(r"^\t\.venv/bin/python sample\.py (.+)$", makefile, re.M):
        arguments = [str(ROOT / word) if word.startswith("assets/") else word for word in shlex.split(command)]
        assert sample.main(sample.parse(arguments)) == 0
        said.append({name: found["change"] for name, found in read_report(capsys.readouterr().out).items()})
    truth = history(0, 1379)[3].changes  # whose images they are, see assets/draw.py
    opposite = {"worse": "improved", "improved": "worse"}
    assert said == [truth, {name: opposite[change] for name, change in truth.items()}]


def test_findings_are_seen():
    table = truth_scores.truth_statistics(reports("true"), [truth_of(state) for state, *_ in held_out()])
    hits, chances = table["findings F1"].sum(0)
    assert hits / chances > 0.8


def test_change_is_read_from_the_prior():
    truths = [truth_of(state) for state, *_ in held_out()]
    told = lambda name: truth_scores.truth_statistics(reports(name), truths)["direction of change"].sum(0)[0]
    assert told("true") > 1.5 * max(told("dummy"), 1)
    turned, changes = zip(*map(truth_scores.severity_flips, reports("true"), reports("reversed"), truths), strict=True)
    assert sum(turned) > 0.4 * sum(changes)  # none where the prior is not looked at
