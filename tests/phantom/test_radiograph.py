"""Drawn radiographs: findings show and grow where they should; what differs from image to image hides the changes."""

from types import SimpleNamespace

import numpy as np
import pytest

from phantom.history import generator, history
from phantom.radiograph import Acquisition, Finding, expose, frontal

STILL = SimpleNamespace(view="PA", exposure=0, contrast=1, shift=(0, 0), angle=0, scale=1, breath=0, noise=0, marker=1)
REGIONS = {  # finding -> side, place; rows and columns of 128 where it shows; 1 if it is brighter there, -1 if darker
    "pleural effusion": ("right", "base", np.s_[51:102, 15:36], 1),
    "consolidation": ("left", "upper lobe", np.s_[19:61, 77:110], 1),
    "atelectasis": ("right", "base", np.s_[64:92, 19:51], 1),
    "edema": ("bilateral", "perihilar", np.s_[38:90, 26:51], 1),
    "pneumothorax": ("left", "apex", np.s_[18:77, 84:113], -1),
    "cardiomegaly": (None, None, np.s_[64:92, 87:110], 1),
    "nodule": ("right", "mid lung", np.s_[51:74, 26:51], 1),
}


def draw(name, severity, body, size=128):
    """Grey values with one finding, or none at severity 0, by an ideal acquisition."""
    side, place, *_ = REGIONS[name]
    present = {name: Finding(side, place, severity)} if severity else {}
    return expose(frontal(body, present, STILL, size), STILL, generator(0, 0, 0, "frontal noise")).astype(float)


@pytest.mark.parametrize("name", REGIONS)
@pytest.mark.parametrize("patient", range(4))
def test_a_finding_shows_and_grows_where_it_should(name, patient):
    side, _, box, sign = REGIONS[name]
    body = history(5, patient)[0].anatomy
    images = [draw(name, severity, body) for severity in (0, 0.15, 0.35, 0.55, 0.75, 0.95)]
    means = [sign * image[box].mean() for image in images]
    assert np.all(np.diff(means[1:]) > 0.7) and means[2] > means[0] + 0.7
    assert abs(images[1] - images[0]).max() > 25  # even the smallest is seen
    if side in ("right", "left"):  # the patient faces us: his right is on the image's left
        difference = abs(images[-1] - images[0])[:, :: 1 if side == "right" else -1]
        assert difference[:, 68:].mean() < 1 < difference[:, :60].mean()


def test_devices_are_bright_and_where_they_should_be():
    body = history(5, 0)[0].anatomy
    for name, side, box in (
        ("endotracheal tube", None, np.s_[:44, 58:70]),
        ("central line", "right", np.s_[:64, 50:64]),
        ("pacemaker", "left", np.s_[20:100, 50:110]),
    ):
        more = frontal(body, {name: Finding(side, None, 1)}, STILL, 128) - frontal(body, {}, STILL, 128)
        assert more.min() >= 0 and more.max() > 0.2 and more[box].sum() > 0.99 * more.sum()


def test_acquisition_hides_what_subtraction_would_show():
    """Two images of an unchanged state differ more than two states do in an ideal image."""
    checked = 0
    for state in (state for patient in range(60) for state in history(0, patient)):
        if set(state.changes.values()) == {"unchanged"} and state.view == "PA":
            images = []
            for study in (state.prior, state):
                shot = Acquisition("PA", study.generator("PA"))
                film = frontal(state.anatomy, state.present, shot, 96)
                images.append(expose(film, shot, study.generator("frontal noise")).astype(float))
            steps = [abs(draw(name, 0.4, state.anatomy, 96) - draw(name, 0.6, state.anatomy, 96)) for name in REGIONS]
            assert abs(images[0] - images[1]).mean() > np.median([step.mean() for step in steps])
            checked += 1
    assert checked >= 5


def test_size_changes_the_detail_and_not_the_picture():
    for state in history(0, 0) + history(0, 3):
        small = frontal(state.anatomy, state.present, STILL, 128)
        large = frontal(state.anatomy, state.present, STILL, 512).reshape(128, 4, 128, 4).mean((1, 3))
        assert np.corrcoef(small.ravel(), large.ravel())[0, 1] > 0.99
        assert abs(small - large).mean() < 0.02


def test_lungs_are_dark_and_the_heart_is_on_the_patient_s_left():
    film = frontal(history(0, 0)[0].anatomy, {}, STILL, 128)
    air, lung, heart, belly = film[0, 0], film[40:60, 28:40], film[78:84, 66:78], film[112:, 40:90]
    assert air < 0.05 < lung.mean() < 0.45 < heart.mean() < belly.mean()
    assert film[76:84, 70:86].mean() > film[76:84, 42:58].mean()
