"""A chest radiograph that is drawn: anatomy, findings and the way it was taken -> grey values.

Drawing is additive, as attenuation is: parts are summed in body coordinates, x from -1 (image left, the patient's
right) to 1, y from -1 (top) to 1, and one film curve turns the sum into grey values.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont


@dataclass(frozen=True)
class Finding:
    """Of a device too, whose severity says nothing."""

    side: str | None  # "right", "left", "bilateral" (of the patient); None where there is none to name
    place: str | None
    severity: float  # 0 to 1


@dataclass(frozen=True)
class Anatomy:
    """What stays the same from study to study: lengths in body coordinates."""

    sex: str
    chest: float  # half the inner width of the rib cage
    body: float  # half the width of the trunk
    heart: float  # scale, 1: a heart of 0.43 of the chest
    pitch: float  # from rib to rib
    slope: float  # fall of the ribs from the spine to the side
    diaphragm: tuple[float, float]  # heights of the domes, patient's right and left
    knob: float  # size of the aortic arch
    curve: float  # bend of the spine
    bubble: float  # gas in the stomach
    clavicle: float  # height of the collar bones
    vessels: tuple  # ((points, width, brightness), …)
    texture: np.ndarray  # [waves, 4]: two frequencies, phase, amplitude

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "Anatomy":
        chest = rng.uniform(0.74, 0.82)
        right = rng.uniform(0.40, 0.50)
        return cls(
            sex="woman" if rng.random() < 0.5 else "man",
            chest=chest,
            body=chest + rng.uniform(0.10, 0.26),
            heart=rng.uniform(0.92, 1.06),
            pitch=rng.uniform(0.135, 0.155),
            slope=rng.uniform(0.20, 0.32),
            diaphragm=(right, right + rng.uniform(0.03, 0.09)),
            knob=rng.uniform(0.7, 1.3),
            curve=rng.uniform(-0.03, 0.03),
            bubble=rng.uniform(0.4, 1.0),
            clavicle=rng.uniform(-0.66, -0.58),
            vessels=tuple(_vessels(rng, -1) + _vessels(rng, 1)),
            texture=np.column_stack(
                [rng.normal(0, 9, 12), rng.normal(0, 9, 12), rng.uniform(0, 2 * np.pi, 12), rng.uniform(0.2, 1, 12)]
            ).astype(np.float32),
        )


def _vessels(rng, side: int) -> list:
    """A tree from one hilum: ten branches that fork twice."""
    lines = []

    def grow(x, y, angle, length, width, depth):
        bend = rng.uniform(-0.7, 0.7)
        points = [(x, y)]
        for _ in range(3):
            angle += bend / 3
            x, y = x + side * length / 3 * math.cos(angle), y + length / 3 * math.sin(angle)
            points.append((x, y))
        lines.append((points, width, min(1.0, 0.12 + 36 * width)))
        if depth:
            spread = rng.uniform(0.25, 0.5)
            for turn in (-spread * rng.uniform(0.5, 1), spread * rng.uniform(0.5, 1)):
                grow(x, y, angle + turn, length * rng.uniform(0.65, 0.85), width * 0.6, depth - 1)

    for angle in np.linspace(-1.35, 1.4, 10):
        start = 0.04 + 0.15 * max(0.0, math.sin(angle))
        grow(side * (0.15 + 0.02 * rng.random()), -0.06 + start, angle + rng.uniform(-0.12, 0.12),
             rng.uniform(0.15, 0.28), rng.uniform(0.017, 0.028), 2)  # fmt: skip
    return lines


@dataclass(frozen=True)
class Acquisition:
    """What differs from image to image and means nothing."""

    view: str  # "AP", "PA", "LATERAL"
    exposure: float = 0.0
    contrast: float = 1.0
    shift: tuple[float, float] = (0.0, 0.0)
    angle: float = 0.0  # radians
    scale: float = 1.0
    breath: float = 0.0  # the diaphragm's fall
    noise: float = 0.0
    marker: int = -1  # the letter that names a side, on the image's left (R) or right (L)

    @classmethod
    def draw(cls, view: str, rng: np.random.Generator) -> "Acquisition":
        portable = 1.6 if view == "AP" else 1.0
        return cls(
            view,
            exposure=rng.uniform(-0.05, 0.05) * portable,
            contrast=rng.uniform(0.9, 1.12),
            shift=(rng.uniform(-0.03, 0.03) * portable, rng.uniform(-0.03, 0.03) * portable),
            angle=rng.uniform(-0.025, 0.025) * portable,
            scale=rng.uniform(0.96, 1.03),
            breath=rng.uniform(-0.035, 0.025) - (0.05 if view == "AP" else 0),
            noise=rng.uniform(0.012, 0.022) * portable**0.5,
            marker=rng.choice((-1, 1)),
        )


def _step(x, width):
    """0 where x is far below 0, 1 far above; width is that of the edge."""
    return 0.5 + 0.5 * np.tanh(x * (2 / width))


def _bump(x, width):
    return np.exp(-np.square(x / width))


class _Sheet:
    """The pixels of one image: body coordinates of each, and strokes drawn in body coordinates."""

    def __init__(self, size: int, shot: Acquisition):
        self.size, self.shot = size, shot
        grid = ((np.arange(size, dtype=np.float32) + 0.5) * 2 / size - 1).astype(np.float32)
        x, y = grid[None] - np.float32(shot.shift[0]), grid[:, None] - np.float32(shot.shift[1])
        cos, sin = (np.float32(f(shot.angle) / shot.scale) for f in (math.cos, math.sin))
        self.x, self.y = cos * x + sin * y, cos * y - sin * x
        self.edge = max(0.012, 2.5 / size)

    def strokes(self, lines, blur=0.0, least=0.9):
        """(points, width, brightness)… -> [size, size], 0 to 1; a line is at least `least` pixels wide."""
        factor = 4 if self.size < 300 else 2
        canvas = Image.new("L", (self.size * factor,) * 2)
        draw = ImageDraw.Draw(canvas)
        shot, half = self.shot, self.size * factor / 2
        cos, sin = math.cos(shot.angle) * shot.scale, math.sin(shot.angle) * shot.scale
        for points, width, value in sorted(lines, key=lambda line: line[2]):
            pixels = [
                ((cos * x - sin * y + shot.shift[0] + 1) * half, (sin * x + cos * y + shot.shift[1] + 1) * half)
                for x, y in points
            ]
            width = max(width * half, least * factor)
            draw.line(pixels, fill=min(255, round(255 * value)), width=round(width), joint="curve")
        canvas = canvas.reduce(factor).filter(ImageFilter.GaussianBlur(blur * self.size / 2))
        return np.asarray(canvas, dtype=np.float32) / 255


def frontal(body: Anatomy, present: dict[str, Finding], shot: Acquisition, size: int) -> np.ndarray:
    """A frontal radiograph without noise and film curve: attenuation [size, size], 0 air, about 1 the abdomen."""
    sheet = _Sheet(size, shot)
    x, y, a, edge = sheet.x, sheet.y, np.abs(sheet.x), sheet.edge
    names = ("atelectasis", "edema", "pleural effusion", "pneumothorax")  # what has a side here, or both
    severity = {name: _severity(present, name, x > 0) for name in names}  # 0 where absent, [size, size] by side

    # the rib cage and the domes of the diaphragm bound the lungs
    top, centre = -0.76, 0.31  # where the apices are
    t = np.clip((y - top) / 1.54, 0, 1)
    outer = centre + (body.chest - centre) * np.power(1 - np.power(1 - t, 2.6), 0.45)
    inner = centre - (centre - 0.06) * np.sqrt(1 - np.square(1 - np.clip(t * 5, 0, 1)))
    u = np.clip(a / outer, 0, 1.2)  # 0 the midline, 1 the chest wall
    raised = 0.14 * severity["atelectasis"] * np.minimum(a / 0.3, 1)
    dome = shot.breath + body.diaphragm[0] + (body.diaphragm[1] - body.diaphragm[0]) * _step(x, 0.5) - raised
    d = (a - 0.40) / (body.chest - 0.40)
    floor = dome + 0.05 * np.square(d) + 0.20 * np.power(np.clip(d, 0, 1.3), 3)
    cage = _step(outer - a, edge) * _step(y - top, edge)
    lung = cage * _step(a - inner, edge) * _step(floor - y, edge)

    # soft tissue: neck, shoulders, trunk, and more of it under the diaphragm
    slope = np.clip((a - 0.22) / 0.78, 0, 1.2)
    shoulder = np.where(a < 0.22, -1.2, -1.07 + 0.17 * np.sqrt(slope) + 0.26 * np.power(slope, 2.2))
    trunk = _step(body.body + 0.5 * _step(-0.25 - y, 0.5) - a, 0.05) * _step(y - shoulder, 0.09)
    depth = np.sqrt(np.clip(1 - np.square(a / (body.body + 0.08)), 0, 1)) * _step(y + 0.95, 0.4)
    belly = _step(y - floor, edge) * cage * (0.10 + 0.16 * np.clip((y - floor) / 0.3, 0, 1))
    film = trunk * (0.40 + 0.20 * depth + np.maximum(belly, 0.26 * _step(y - 0.85, 0.3)))
    if body.sex == "woman":
        breast = _step(0.33 - np.hypot(a - 0.45, (y - 0.18) * 1.05), 0.04)
        film += 0.07 * trunk * breast * np.clip(0.5 + (y - 0.05) * 1.5, 0, 1)

    # heart and mediastinum take the place of air
    m = x - body.curve * np.sin(2.2 * y)  # from the midline of the spine
    inside = _silhouette(x, y, m, body, present, shot)
    solid = _step(inside, edge * 2.2)
    lung *= 1 - 0.45 * solid
    air = lung * (1 - solid * np.clip(0.35 + 1.6 * inside, 0.35, 0.8))
    film += 0.05 * solid * trunk - air * (0.24 + 0.08 * np.clip((1 - u) * 4, 0, 1))

    # pneumothorax: the lung falls from the wall, most at the apex; its edge is a line, beyond it no vessels
    free = 0.0
    if "pneumothorax" in present:
        gap = 0.06 * (severity["pneumothorax"] > 0) + 0.30 * severity["pneumothorax"]
        wall, apex = outer - gap * np.clip(1.2 - 0.7 * t, 0, 1) - a, (y - top - 0.05 - 1.5 * gap) * 1.3
        within = -np.logaddexp(-16 * wall, -16 * apex) / 16  # a length, positive in the lung
        collapsed = lung * (gap > 0)
        free = collapsed * _step(-within, edge)
        film += collapsed * 0.11 * _bump(within, max(0.012, 1.6 / size)) + 0.2 * gap * (collapsed - free) - 0.06 * free

    film += _bones(sheet, body, u, outer, cage, trunk, m, shot.view == "AP")

    # airways, gas in the stomach
    film -= 0.17 * trunk * _step(0.036 - np.abs(m + 0.012), 0.03) * _step(-0.20 - y, 0.05)
    bronchi = [([(-0.012, -0.22), (-0.13, -0.08)], 0.05, 1), ([(-0.012, -0.22), (0.14, -0.06)], 0.045, 1)]
    film -= 0.08 * sheet.strokes(bronchi, blur=0.015)
    gas = 1 - np.square((x - 0.42) / 0.17) - np.square((y - dome - 0.12 - raised) / 0.065)
    film -= 0.22 * body.bubble * _step(gas, 0.4) * (x > 0) * _step(y - floor - 0.02, 0.03)

    # vessels, hila and the lungs' texture, where there is air
    aerated, wet = lung * (1 - free), float(np.max(severity["edema"]))
    vessels = [(points, width * (1 + 0.3 * wet), value) for points, width, value in body.vessels]
    tree = sheet.strokes(vessels, blur=0.004 + 0.008 * wet)  # edema blurs them
    film += (0.13 + 0.03 * wet) * tree * aerated * (1 - 0.7 * solid)
    film += 0.09 * _bump(np.hypot((a - 0.17) * 1.1, y + 0.02 + 0.05 * (x > 0)), 0.085) * (1 - free)
    waves = sum(height * np.sin(fx * x + fy * y + phase) for fx, fy, phase, height in body.texture)
    film += 0.008 * waves * (0.5 + aerated)

    # what fills air
    if wet:
        bat = _bump(np.hypot(a - 0.22, (y - 0.05) / 1.25), 0.30 + 0.25 * wet)  # wings around the hila
        film += aerated * (0.02 + 0.02 * wet + (0.08 + 0.22 * wet) * bat) * (1 + 0.07 * waves)
        film += 0.13 * aerated * sheet.strokes(_kerley(body.chest, wet), blur=0.003)
    if "consolidation" in present:
        film += aerated * _consolidation(sheet, present["consolidation"], body.chest, waves)
    if "atelectasis" in present:
        low = severity["atelectasis"]
        film += aerated * (_plates(a, y - dome, low) + 0.26 * low * _bump(y - floor, 0.20))
    if "nodule" in present:
        nx, ny = _spot(present["nodule"], body.chest, 0.58)
        radius = 0.030 + 0.12 * present["nodule"].severity
        film += 0.27 * _step(1 - np.hypot(x - nx, y - ny) / radius, 0.35)
    if "pleural effusion" in present:  # a meniscus, highest at the wall
        fluid = severity["pleural effusion"]
        level = 0.74 + shot.breath - (0.18 + 0.90 * fluid) * (0.36 + 0.64 * np.power(np.minimum(u, 1), 3))
        film += 0.42 * lung * (fluid > 0) * _step(y - level, 0.05 + 0.04 * fluid)

    return film + _devices(sheet, present, body)


def _severity(present: dict[str, Finding], name: str, left: np.ndarray):
    """float32 [size, size], by the side of the patient; 0 where it is absent."""
    if name not in present:
        return np.float32(0)
    sides = [
        np.float32(present[name].severity * (present[name].side in (side, "bilateral"))) for side in ("left", "right")
    ]
    return np.where(left, *sides)


def _silhouette(x, y, m, body, present, shot):
    """Heart, great vessels and spine joined smoothly: a length, positive inside."""
    left = (
        0.125 + 0.075 * body.knob * _bump(y + 0.38, 0.10) + 0.045 * _bump(y + 0.13, 0.11) + 0.03 * _bump(y + 0.8, 0.2)
    )
    right = 0.115 + 0.025 * _bump(y + 0.3, 0.2) + 0.03 * _bump(y + 0.8, 0.2)
    middle = np.where(m > 0, left, right) - np.abs(m)
    scale = body.heart * (1.04 if shot.view == "AP" else 1.0)  # nearer to the tube, larger on the film
    if "cardiomegaly" in present:
        scale *= 1.18 + 0.44 * present["cardiomegaly"].severity
    cx, cy = 0.115 * scale, 0.27 - 0.04 * (scale - 1) + 0.7 * shot.breath
    p, q = (x - cx) * 0.86 + (y - cy) * 0.51, (y - cy) * 0.86 - (x - cx) * 0.51  # along the heart's axis, across it
    ventricle = np.hypot(p / (0.345 * scale), q / (0.26 * scale))
    atrium = np.hypot((x + 0.025 * scale) / (0.175 * scale), (y - cy + 0.03) / (0.23 * scale))
    heart = 0.25 * scale * (1 - np.minimum(ventricle, atrium))
    return np.logaddexp(22 * middle, 22 * heart) / 22 - 0.008


def _bones(sheet, body, u, outer, cage, trunk, m, ap):
    """Ribs behind and in front, spine, clavicles, shoulder blades, heads of the upper arms."""
    y, a, edge = sheet.y, np.abs(sheet.x), sheet.edge
    fall = body.slope * (np.power(u, 2.4) - 0.55 * u * (1 - u))
    behind = _ribs((y - fall + 0.72) / body.pitch, body.pitch, 10.5, edge)
    climb = 0.34 * np.power(np.clip(1 - u, 0, 1), 1.1)
    before = _ribs((y - climb + 0.56) / (body.pitch * 1.12), body.pitch, 7, edge)
    film = cage * (behind * (0.55 + 0.45 * u) + 0.40 * before * _step(u - 0.55, 0.3))
    film += 0.10 * trunk * _bump(a - outer, 0.022) * _step(y + 0.76, 0.1) * _step(0.95 - y, 0.2)

    disc = (y / 0.125) % 1
    vertebrae = _step(0.085 + 0.01 * y - np.abs(m), edge) * (0.10 - 0.05 * _bump(disc - 0.5, 0.16))
    film += vertebrae * (1 - 0.6 * _step(y - 0.5, 0.3))
    film += 0.06 * _bump(np.abs(m) - 0.062, 0.016) * _bump(disc - 0.05, 0.22)  # pedicles

    along = np.clip((a - 0.1) / 0.7, 0, 1)
    collar = y - body.clavicle - 0.05 + 0.16 * along - (0.02 if ap else 0.05) * np.sin(along * 2 * np.pi)
    clavicle = _step(0.030 - np.abs(collar), edge) * _step(a - 0.09, 0.03) * _step(0.92 - a, 0.03)
    film += clavicle * (0.11 + 0.08 * _bump(np.abs(collar) - 0.024, 0.012))
    blade = a - (0.78 if ap else 0.86) + 0.10 * (y + 0.45)
    film += (
        trunk
        * (0.06 * _step(blade, 0.03) + 0.05 * _bump(blade - 0.02, 0.02))
        * _step(0.05 - y, 0.1)
        * _step(collar, 0.1)
    )
    arm = np.hypot(a - 1.05, y + 0.50)
    return film + trunk * (0.05 * _step(0.14 - arm, 0.04) + 0.05 * _bump(arm - 0.13, 0.02))


def _ribs(phase, pitch, count, edge):
    """Bands at whole phases: brighter at their borders, as cortex is."""
    distance = np.abs((phase + 0.5) % 1 - 0.5) * pitch
    band = _step(0.033 - distance, edge * 0.8) * (0.062 + 0.042 * _bump(distance - 0.027, 0.012))
    return band * ((phase > -0.5) & (phase < count))


def _spot(finding: Finding, chest: float, across: float) -> tuple[float, float]:
    """Where a finding lies: its zone's centre, `across` of the way from the midline to the chest wall."""
    height = {"upper": -0.42, "mid": -0.02, "lower": 0.26}[finding.place.split()[0]]
    return (1 if finding.side == "left" else -1) * across * chest, height


def _consolidation(sheet, finding, chest, waves):
    """A ragged cloud, in which air shows the bronchi."""
    cx, cy = _spot(finding, chest, 0.56)
    side, radius = math.copysign(1, cx), 0.10 + 0.28 * finding.severity
    ragged = np.hypot(sheet.x - cx, sheet.y - cy) / radius + 0.07 * waves
    fork = (cx - side * 0.06, cy)
    ends = [(cx + side * dx * radius, cy + dy * radius) for dx, dy in ((0.5, -0.5), (0.65, 0.1), (0.4, 0.6))]
    bronchi = [([(side * 0.2, -0.02), fork], 0.014, 1)] + [([fork, end], 0.012, 1) for end in ends]
    return _step(1 - ragged, 0.7) * (0.22 + 0.11 * finding.severity) * (1 - 0.3 * sheet.strokes(bronchi, blur=0.007))


def _plates(a, height, severity):
    """Linear atelectasis: bands over the dome, longer, thicker and more with severity."""
    film = 0
    for row in range(3):
        along = (a - 0.44 - 0.03 * row) / (0.17 + 0.10 * severity)
        band = _bump(height + 0.05 + 0.10 * row - 0.03 * along, 0.021 + 0.015 * severity)
        film = film + band * _step(1 - np.abs(along), 0.6) * np.clip(6 * severity - 1.7 * row, 0, 1)
    return film * (0.24 + 0.04 * severity)


def _kerley(chest, severity):
    """Septal lines: short, level, at the sides of the bases."""
    length = 0.11 + 0.05 * severity
    rows = [(side, y) for side in (-1, 1) for y in np.arange(0.46, 0.12, -0.055)]
    line = lambda side, y: [(side * (chest - 0.03 - length), y), (side * (chest - 0.03), y + 0.01)]
    return [(line(side, y), 0.010, 0.5 + 0.5 * severity) for side, y in rows]


def _devices(sheet, present, body):
    film = 0
    if "endotracheal tube" in present:
        tube = [(-0.005, -1.1), (-0.01, -0.6), (-0.012, -0.33)]
        film = film + 0.30 * sheet.strokes([(tube, 0.026, 1)], least=1.1)
    if "central line" in present:  # down a jugular vein to the right atrium
        side = 1 if present["central line"].side == "left" else -1
        neck = [(side * 0.19, -0.98), (side * 0.17, -0.80), (side * 0.13, -0.60)]
        cross = [(0.06, -0.50), (-0.06, -0.42)] if side > 0 else []
        line = _rounded([*neck, *cross, (-0.105, -0.30), (-0.11, -0.02)])
        film = film + 0.27 * sheet.strokes([(line, 0.016, 1)], least=1.1)
    if "pacemaker" in present:  # a box below the clavicle, a lead to the apex of the right ventricle
        side = 1 if present["pacemaker"].side == "left" else -1
        px, py = side * 0.72 * body.chest, -0.50
        box = np.power((sheet.x - px) / 0.115, 4) + np.power((sheet.y - py) / 0.095, 4)
        vein = [(px - side * 0.08, py - 0.07), (side * 0.25, -0.62), (-0.02, -0.50), (-0.11, -0.30)]
        lead = _rounded([*vein, (-0.11, 0.10), (0.05, 0.34), (0.25, 0.42)])
        film = film + 0.75 * _step(1 - box, 0.3) + 0.42 * sheet.strokes([(lead, 0.014, 1)], least=1.1)
    return film


def _rounded(points):
    """A polyline with its corners cut three times over, the ends kept."""
    points = np.asarray(points)
    for _ in range(3):
        near, far = points[:-1] * 0.75 + points[1:] * 0.25, points[:-1] * 0.25 + points[1:] * 0.75
        points = np.concatenate((points[:1], np.stack((near, far), 1).reshape(-1, 2), points[-1:]))
    return points.tolist()


def lateral(body: Anatomy, present: dict[str, Finding], shot: Acquisition, size: int) -> np.ndarray:
    """The companion of a frontal view, the patient facing the image's left: attenuation [size, size]."""
    sheet = _Sheet(size, shot)
    x, y, edge = sheet.x, sheet.y, sheet.edge
    severity = lambda name: present[name].severity if name in present else 0.0
    bow = np.sqrt(np.clip(1 - np.square((y - 0.22) / 1.06), 0, 1))
    front, back = -0.20 - 0.42 * bow - 0.10 * y, 0.22 + 0.50 * bow
    floor = 0.30 + shot.breath + 0.5 * np.square(x + 0.25) + 0.25 * np.power(np.clip(x, 0, 1), 3)
    lung = _step(x - front, edge * 2) * _step(back - x, edge * 2) * _step(floor - y, edge)
    lung *= _step(y + 0.70 + 0.3 * x, 0.12)
    trunk = _step(x - front + 0.14 + 0.08 * y, 0.06) * _step(back + 0.16 - x, 0.06)
    film = trunk * (0.52 + 0.10 * bow + 0.14 * _step(y - floor, 0.08) + 0.10 * _step(-0.62 - y, 0.3))

    # what takes the place of air: heart, hila, findings
    scale = body.heart * (1 + 0.45 * severity("cardiomegaly"))
    fill = 0.60 * _step(1 - np.hypot((x + 0.27) / (0.35 * scale), (y - 0.18) / (0.34 * scale)), 0.25)
    fill += 0.25 * _bump(np.hypot(x - 0.02, y + 0.08), 0.15) + 0.5 * severity("edema") * _bump(np.hypot(x, y), 0.5)
    if "pleural effusion" in present:
        rise = 0.4 + 0.6 * np.square(np.clip((x + 0.2) / 0.8, 0, 1))
        fill += 0.9 * _step(y - 0.80 - shot.breath + 0.9 * severity("pleural effusion") * rise, 0.08)
    for name, radius in (("consolidation", 0.32), ("nodule", 0.09)):
        if name in present:
            height = _spot(present[name], 0, 0)[1]
            fill += 0.5 * _step(1 - np.hypot(x - 0.15, y - height) / radius, 0.5)
    film -= 0.34 * lung * np.clip(1 - fill, 0, 1)

    disc = ((y + 0.3 * x) / 0.14) % 1
    film += trunk * _step(0.085 - np.abs(x - back + 0.17), edge) * (0.13 - 0.07 * _bump(disc - 0.5, 0.15))
    film += 0.10 * trunk * _bump(x - front + 0.02, 0.025) * _step(0.35 - y, 0.1)  # sternum
    film += 0.5 * lung * _ribs((y - 0.45 * np.square(x - 0.1) + 0.3 * x + 0.7) / body.pitch, body.pitch, 10, edge)
    trachea = _step(0.04 - np.abs(x - 0.03 - 0.12 * (y + 0.5)), 0.04) * _step(-0.12 - y, 0.06)
    return film - 0.12 * trunk * trachea


def expose(film: np.ndarray, shot: Acquisition, rng: np.random.Generator) -> np.ndarray:
    """Attenuation -> grey values uint8: quantum noise and grain, the film curve, the side marker."""
    size = len(film)
    film = film + rng.standard_normal(film.shape, dtype=np.float32) * np.float32(shot.noise)
    coarse = Image.fromarray(rng.standard_normal((12, 12), dtype=np.float32)).resize((size, size), Image.BICUBIC)
    film += 0.6 * shot.noise * np.asarray(coarse)
    curve = 1 / (1 + np.exp(-6.2 * shot.contrast * (film - 0.50 + shot.exposure)))
    image = Image.fromarray((np.clip(curve * 1.06 - 0.035, 0, 1) * 255 + 0.5).astype(np.uint8))
    marker = ("R", 0.05) if shot.marker < 0 else ("L", 0.95)
    ImageDraw.Draw(image).text((marker[1] * size, 0.05 * size), marker[0], 235, font(0.07 * size), anchor="mt")
    return np.asarray(image)


@lru_cache
def font(size: float):
    return ImageFont.load_default(size)
