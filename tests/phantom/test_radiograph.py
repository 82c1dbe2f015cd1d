"""Drawn radiographs: findings show where they should, and grow; what differs from image to image hides them."""

import numpy as np
import pytest

from phantom import hospital as phantom
from phantom import radiograph


def states(patients):
    return [state for patient in range(patients) for state in phantom.history(0, patient)]


# ------------------------------------------------------------------------------------------------------------ images

STILL = radiograph.Acquisition("PA")
REGIONS = {  # finding -> (side, place, box of the image as (left, top, right, bottom) shares, brighter or darker)
    "pleural effusion": ("right", "base", (0.12, 0.40, 0.28, 0.80), 1),
    "consolidation": ("left", "upper lobe", (0.60, 0.15, 0.86, 0.48), 1),
    "atelectasis": ("right", "base", (0.15, 0.50, 0.40, 0.72), 1),
    "edema": ("bilateral", "perihilar", (0.20, 0.30, 0.40, 0.70), 1),
    "pneumothorax": ("left", "apex", (0.66, 0.14, 0.88, 0.60), -1),
    "cardiomegaly": (None, None, (0.68, 0.50, 0.86, 0.72), 1),
    "nodule": ("right", "mid lung", (0.20, 0.40, 0.40, 0.58), 1),
}


def draw(name, severity, body, size=128):
    """Grey values of a finding alone, without jitter or noise; severity 0: without it."""
    side, place = REGIONS[name][:2]
    present = {name: radiograph.Finding(side, place, severity)} if severity else {}
    film = radiograph.frontal(body, present, STILL, size)
    return radiograph.expose(film, STILL, phantom.generator(0, 0, 0, "frontal noise")).astype(float)


@pytest.mark.parametrize("name", REGIONS)
def test_a_finding_shows_and_grows_where_it_should(name):
    side, _, (left, top, right, bottom), way = REGIONS[name]
    box = np.s_[round(128 * top) : round(128 * bottom), round(128 * left) : round(128 * right)]
    for patient in range(4):
        body = phantom.anatomy(5, patient)
        images = [draw(name, severity, body) for severity in (0, 0.15, 0.35, 0.55, 0.75, 0.95)]
        means = [way * image[box].mean() for image in images]
        assert np.all(np.diff(means[1:]) > 0.7) and means[2] > means[0] + 0.7, means
        assert abs(images[1] - images[0]).max() > 25  # even the smallest is seen
        if side in ("left", "right"):  # of the patient, who faces us
            other = np.s_[:, :60] if side == "left" else np.s_[:, 68:]
            assert abs(images[-1] - images[0])[other].mean() < 1 < abs(images[-1] - images[0])[:, ::-1][other].mean()


def test_devices_are_bright_and_where_they_should_be():
    body = phantom.anatomy(5, 0)
    plain = radiograph.frontal(body, {}, STILL, 128)
    for name, side, box in (
        ("endotracheal tube", None, np.s_[:44, 58:70]),
        ("central line", "right", np.s_[:64, 50:64]),
        ("pacemaker", "left", np.s_[20:100, 50:110]),
    ):
        more = radiograph.frontal(body, {name: radiograph.Finding(side, None, 1)}, STILL, 128) - plain
        assert more.min() >= 0 and more.max() > 0.2 and more[box].sum() > 0.99 * more.sum()


def test_acquisition_hides_what_subtraction_would_show():
    """Two images of one unchanged state differ more than a state's next step does in a still image."""
    checked = 0
    for state in states(60):
        if set(state.changes.values()) == {"unchanged"} and state.view == "PA":
            before, after = (
                radiograph.Acquisition.draw("PA", phantom.generator(0, state.patient, n, "PA"))
                for n in (state.number - 1, state.number)
            )
            body = phantom.anatomy(0, state.patient)
            a, b = (radiograph.expose(radiograph.frontal(body, state.present, shot, 96), shot,
                                   phantom.generator(0, state.patient, n, "frontal noise")).astype(float)
                    for n, shot in enumerate((before, after)))  # fmt: skip
            steps = [abs(draw(name, 0.4, body, 96) - draw(name, 0.6, body, 96)).mean() for name in REGIONS]
            assert abs(a - b).mean() > np.median(steps)
            checked += 1
    assert checked >= 5


def test_size_changes_the_detail_and_not_the_picture():
    for state in states(4):
        body = phantom.anatomy(0, state.patient)
        small, large = (radiograph.frontal(body, state.present, STILL, size) for size in (128, 512))
        large = large.reshape(128, 4, 128, 4).mean((1, 3))
        assert np.corrcoef(small.ravel(), large.ravel())[0, 1] > 0.99 and abs(small - large).mean() < 0.02


def test_a_study_has_its_image_and_another_study_another():
    image = lambda seed, patient: phantom.picture(phantom.history(seed, patient)[0], "PA", 64)
    first = image(2, 1)
    assert first.shape == (64, 64) and first.dtype == np.uint8 and np.array_equal(first, image(2, 1))
    assert not np.array_equal(first, image(2, 2)) and not np.array_equal(first, image(3, 1))


def test_lungs_are_dark_and_the_heart_is_on_the_patient_s_left():
    body = phantom.anatomy(0, 0)
    film = radiograph.frontal(body, {}, STILL, 128)
    lung, heart, belly, air = film[40:60, 28:40].mean(), film[78:84, 66:78].mean(), film[112:, 40:90].mean(), film[0, 0]
    assert air < 0.05 < lung < 0.45 < heart < belly
    assert film[76:84, 70:86].mean() > film[76:84, 42:58].mean()
