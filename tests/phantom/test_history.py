"""Patients over time: what the drawn hospital promises about ids, changes and priors, counted over 1,500 patients."""

from collections import Counter, defaultdict

import numpy as np
import pytest

from phantom.history import DEVICES, FINDINGS, history, picture


@pytest.fixture(scope="module")
def states():
    return [state for patient in range(1500) for state in history(0, patient)]


def test_no_two_patients_studies_or_images_share_an_id(states):
    studies = [state.study_id for state in states]
    images = [image_id for state in states for image_id in state.images.values()]
    assert len(set(studies)) == len(studies)
    assert len(set(images)) == len(images)
    assert len({state.subject_id for state in states}) == 1500


def test_a_third_of_the_studies_have_no_prior_and_everything_occurs(states):
    without = sum(state.prior is None for state in states)
    assert abs(without / len(states) - 1 / 3) < 0.03
    assert {state.number for state in states} == set(range(6))
    assert {name for state in states for name in state.present} == FINDINGS.keys() | DEVICES.keys()


def test_a_single_severity_hardly_tells_the_change(states):
    """The best guess from the severity alone is hardly better than always guessing the most frequent change."""
    counts = defaultdict(Counter)  # eighth of the severity -> how often each change
    for state in states:
        for name, change in state.changes.items():
            if name in FINDINGS and change != "resolved":
                counts[int(state.present[name].severity * 8)][change] += 1
    total = sum(counts.values(), Counter())
    blind = max(total.values()) / total.total()
    informed = sum(max(changes.values()) for changes in counts.values()) / total.total()
    assert blind < 0.35
    assert informed < 0.42


def test_each_study_has_an_image_of_its_own():
    image = lambda seed, patient: picture(history(seed, patient)[0], "PA", 64)
    first = image(2, 1)
    assert first.shape == (64, 64) and first.dtype == np.uint8
    assert np.array_equal(first, image(2, 1))
    assert not np.array_equal(first, image(2, 2))
    assert not np.array_equal(first, image(3, 1))
