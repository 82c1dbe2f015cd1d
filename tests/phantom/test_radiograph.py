"""Drawn radiographs: findings show and grow where they should; what differs from image to image hides the changes."""

from types import SimpleNamespace

import numpy as np
import pytest

from phantom.history import generator, history, picture
from phantom.radiograph import APEX, Acquisition, Finding, expose, frontal

STILL = SimpleNamespace(view="PA", exposure=0, contrast=1, shift=(0, 0), angle=0, scale=1, breath=0, noise=0, marker=1,
                        stretch=0, turn=0, crop=(0, 0, 0, 0))  # fmt: skip
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


def acquisitions(view, count):
    return [Acquisition(view, generator(1, number, 0, view)) for number in range(count)]


def test_bodies_move_between_images_and_stay_within_the_promised_limits():
    shots = acquisitions("AP", 200) + acquisitions("PA", 200)
    for most, values in (
        (0.16, [shot.shift[0] for shot in shots]),  # 8 % of a side, which is 2 long
        (0.16, [shot.shift[1] for shot in shots]),
        (np.radians(6), [shot.angle for shot in shots]),
        (0.08, np.log([shot.scale for shot in shots])),
    ):
        assert 0.9 * most < np.ptp(values) <= most


class Extreme:
    """A generator whose draws are all at one end of their range or the other, as the bits of a number say."""

    def __init__(self, bits):
        self.bits = bits

    def uniform(self, low, high, count=None):
        self.bits, last = divmod(self.bits, 2)
        end = high if last else low
        return np.full(count, end) if count else end

    def choice(self, options):
        return options[0]


@pytest.mark.parametrize("view", ["AP", "PA"])
def test_the_lungs_are_always_in_the_image(view):
    """The largest chest of `Anatomy`: walls at 0.82, a dome at 0.59 and the floor's end 0.25 below it."""
    for bits in range(2**10):  # an acquisition draws ten times
        shot = Acquisition(view, Extreme(bits))
        corners = [complex(x, y) for x in (-0.82, 0.82) for y in (0, 0.84 + shot.breath)]
        corners += [complex(x, APEX) for x in (-0.31, 0.31)]
        moved = shot.scale * np.exp(1j * shot.angle) * np.array(corners) + complex(*shot.shift)
        left, top, right, bottom = 2 * shot.crop
        assert left - 1 < moved.real.min() and moved.real.max() < 1 - right
        assert top - 1 < moved.imag.min() and moved.imag.max() < 1 - bottom


@pytest.mark.parametrize("name", REGIONS)
def test_a_severity_is_told_apart_however_the_body_lies_and_breathes(name):
    """What a finding adds, relative to the body's size: every image of a finding has less than every much worse one."""
    side, place, *_ = REGIONS[name]
    body, least = history(5, 1)[0].anatomy, 0
    for severity in (0.15, 0.5, 0.85):
        added = []
        for shot in acquisitions("PA", 12) + acquisitions("AP", 12):
            more = frontal(body, {name: Finding(side, place, severity)}, shot, 64) - frontal(body, {}, shot, 64)
            added.append(abs(more).sum() / shot.scale**2)
        assert min(added) > least
        least = max(added)


def test_a_breath_moves_what_is_in_the_lungs_with_the_diaphragm():
    """A nodule's height above the base, by hand: at rest it is at y 0.26 of lungs from -0.76 to 0.45."""
    body, nodule = history(5, 0)[0].anatomy, {"nodule": Finding("right", "lower lung", 0.5)}
    for breath in (-0.12, 0, 0.05):
        shot = SimpleNamespace(**vars(STILL) | {"breath": breath, "stretch": breath / 1.21})
        rows = (frontal(body, nodule, shot, 128) - frontal(body, {}, shot, 128)).sum(1)
        y = rows @ ((np.arange(128) + 0.5) / 64 - 1) / rows.sum()
        assert abs(y - (-0.76 + 1.02 * (1.21 + breath) / 1.21)) < 0.01


def test_an_image_has_black_borders_and_its_marker():
    shot = SimpleNamespace(**vars(STILL) | {"exposure": 1, "crop": (0.02, 0.01, 0, 0.05)})
    image = expose(np.ones((100, 100), dtype=np.float32), shot, generator(0, 0, 0, "frontal noise"))
    assert not image[:, :2].any() and not image[:1].any() and not image[95:].any()
    assert image[20:95, 2:].min() == 255 and image[5:12, 90:].min() < 255


def test_a_study_has_its_own_placement_and_always_the_same():
    states = history(0, 3)
    assert np.array_equal(picture(states[0], states[0].view, 64), picture(history(0, 3)[0], states[0].view, 64))
    angles = [Acquisition("PA", state.generator("PA")).angle for state in states]
    assert len(set(angles)) == len(states) > 1


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
