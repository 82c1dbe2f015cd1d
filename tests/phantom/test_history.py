"""Patients over time: what the drawn hospital promises about ids, priors and changes, counted over 1,500 patients."""

from collections import Counter, defaultdict

import pytest

from phantom.history import DEVICES, FINDINGS, history


@pytest.fixture(scope="module")
def states():
    return [state for patient in range(1500) for state in history(0, patient)]


def test_no_two_patients_studies_or_images_share_an_id(states):
    images = [image_id for state in states for image_id in state.images.values()]
    assert len(set(images)) == len(images)
    assert len({state.study_id for state in states}) == len(states)
    assert len({state.subject_id for state in states}) == 1500


def test_a_third_of_the_studies_have_no_prior_and_everything_occurs(states):
    assert abs(sum(state.prior is None for state in states) / len(states) - 1 / 3) < 0.03
    assert {state.number for state in states} == set(range(6))
    assert {name for state in states for name in state.present} == FINDINGS.keys() | DEVICES.keys()


def test_a_single_severity_hardly_tells_the_change(states):
    """The best guess from the severity is hardly better than always guessing the most frequent change."""
    counts = defaultdict(Counter)  # eighth of the severity -> how often each change
    for state in states:
        for name, change in state.changes.items():
            if name in FINDINGS and change != "resolved":
                counts[int(state.present[name].severity * 8)][change] += 1
    total = sum(counts.values(), Counter())
    assert max(total.values()) / total.total() < 0.35
    assert sum(max(changes.values()) for changes in counts.values()) / total.total() < 0.42
