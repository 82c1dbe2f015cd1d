"""Draws chest radiographs: from anatomy, findings and the acquisition to grey values.

X-rays add up what they pass through. A drawing therefore is a sum: every structure adds its attenuation to one film
(0 is air, about 1 the abdomen), and at the end a film curve turns the sum into grey values.

All lengths are in body coordinates: x runs from -1 (image left, the patient's right) to 1, y from -1 (top) to 1.
Every array is [size, size]. The numbers were tuned by eye.

Nothing is resampled: each pixel is evaluated at its place in the body. An acquisition shifts, turns and scales the
whole body; a breath moves the diaphragm, and stretches what is in the chest between it and the apices.
"""

import cmath
import math
from typing import NamedTuple

import numpy as np
from numpy import clip, float32, hypot, sqrt
from PIL import Image, ImageDraw, ImageFilter, ImageFont

JUGULAR = ((0.19, -0.98), (0.17, -0.80), (0.13, -0.60))  # the vein, on the left
CARINA = (-0.012, -0.22)  # where the trachea forks
TUBE = ((-0.005, -1.1), (-0.01, -0.6), (-0.012, -0.33))  # in the trachea
APEX, BASE = -0.76, 0.45  # y of the lungs' apices, and of the diaphragm at rest
LEAD = ((-0.02, -0.50), (-0.11, -0.30), (-0.11, 0.10), (0.05, 0.34), (0.25, 0.42))  # a pacemaker's, in the heart


class Finding(NamedTuple):
    """A finding or a device at one time. The severity of a device has no meaning."""

    side: str | None  # the patient's "right" or "left", or "bilateral"; None where no side is named
    place: str | None
    severity: float  # 0 to 1; 0 means absent


class Stroke(NamedTuple):
    points: list[tuple[float, float]]
    width: float
    brightness: float = 1  # 0 to 1


class Anatomy:
    """What stays the same from study to study of a patient."""

    def __init__(self, rng: np.random.Generator):
        self.chest = rng.uniform(0.74, 0.82)  # half the inner width of the rib cage
        right_dome = rng.uniform(0.40, 0.50)
        self.sex = "woman" if rng.random() < 0.5 else "man"
        self.body = self.chest + rng.uniform(0.10, 0.26)  # half the width of the trunk
        self.heart = rng.uniform(0.92, 1.06)  # scale: at 1 the heart is 0.43 of the chest's width
        self.pitch = rng.uniform(0.135, 0.155)  # from rib to rib
        self.slope = rng.uniform(0.20, 0.32)  # how far ribs fall from the spine to the side
        self.diaphragm = (right_dome, right_dome + rng.uniform(0.03, 0.09))  # y of the domes: right, left
        self.knob = rng.uniform(0.7, 1.3)  # size of the aortic arch
        self.curve = rng.uniform(-0.03, 0.03)  # bend of the spine
        self.bubble = rng.uniform(0.4, 1.0)  # gas in the stomach
        self.clavicle = rng.uniform(-0.66, -0.58)  # y of the collar bones
        self.vessels = _vessels(rng, -1) + _vessels(rng, 1)
        # the lungs' texture is a sum of waves; a row of `waves` is (x frequency, y frequency, phase, amplitude)
        columns = [rng.normal(0, 9, 12), rng.normal(0, 9, 12)]
        columns += [rng.uniform(0, 2 * np.pi, 12), rng.uniform(0.2, 1, 12)]
        self.waves = np.column_stack(columns).astype(float32)


def _vessels(rng, side: int) -> list[Stroke]:
    """The vessels of one lung: ten branches from the hilum, each of which forks twice."""
    strokes = []

    def grow(x, y, angle, *, length, width, forks):
        # a branch is three straight pieces with the same bend between them
        points = [(x, y)]
        bend = rng.uniform(-0.7, 0.7)
        for _ in range(3):
            angle += bend / 3
            x += side * length / 3 * math.cos(angle)
            y += length / 3 * math.sin(angle)
            points.append((x, y))
        strokes.append(Stroke(points, width, min(1.0, 0.12 + 36 * width)))
        if forks:
            spread = rng.uniform(0.25, 0.5)
            for turn in [sign * spread * rng.uniform(0.5, 1) for sign in (-1, 1)]:
                size = {"length": length * rng.uniform(0.65, 0.85), "width": width * 0.6}
                grow(x, y, angle + turn, **size, forks=forks - 1)

    for angle in np.linspace(-1.35, 1.4, 10):
        x = side * (0.15 + 0.02 * rng.random())
        y = -0.06 + (0.04 + 0.15 * max(0.0, math.sin(angle)))
        angle += rng.uniform(-0.12, 0.12)
        size = {"length": rng.uniform(0.15, 0.28), "width": rng.uniform(0.017, 0.028)}
        grow(x, y, angle, **size, forks=2)
    return strokes


class Acquisition:
    """What differs from image to image and has no meaning. view: "AP", "PA" or "LATERAL".

    aligned=True places all bodies nearly alike. Otherwise two images of a patient differ by up to 8 % of the image's
    side in each direction, by up to 6 degrees and by up to 8 % in size. The lungs always stay in the image.
    """

    def __init__(self, view: str, rng: np.random.Generator, aligned: bool = False):
        # an AP view is taken in bed: worse in all respects, and the patient does not breathe in deeply
        portable = 1.6 if view == "AP" else 1.0
        if aligned:
            shift, centre, angle, spread = 0.03, 0, 0.025, portable
            scales, breaths = (0.96, 1.03), (-0.035, 0.025)
        else:
            # smaller and higher than in the middle, which leaves room for the lungs' bases
            shift, centre, angle, spread = 0.08, -0.04, math.radians(3), 1
            scales, breaths = (0.89, 0.96), (-0.08, 0.05)
        self.view = view
        self.exposure = rng.uniform(-0.05, 0.05) * portable
        self.contrast = rng.uniform(0.9, 1.12)
        self.shift = [rng.uniform(-shift, shift) * spread for _ in "xy"]
        self.shift[1] += centre
        self.angle = rng.uniform(-angle, angle) * spread  # radians
        self.scale = rng.uniform(*scales)
        self.breath = rng.uniform(*breaths) - (0.05 if view == "AP" else 0)  # how far the diaphragm is down
        self.noise = rng.uniform(0.012, 0.022) * portable**0.5
        self.marker = rng.choice((-1, 1))  # the letter that names a side: R on the image's left or L on its right
        if aligned:
            self.stretch, self.turn, self.crop = 0, 0, (0, 0, 0, 0)
        else:
            self.stretch = self.breath / (BASE - APEX)  # how much longer the lungs are than at rest
            self.turn = rng.uniform(-0.02, 0.02)  # of the chest: how far the heart moves left, and the spine right
            self.crop = rng.uniform(0, 0.025, 4)  # black borders, parts of the side: left, top, right, bottom


def step(x, width):
    """A soft edge: 0 where x is far below 0, 1 where it is far above."""
    return 0.5 + 0.5 * np.tanh(x * (2 / width))


def bump(x, width):
    """A soft line: 1 where x is 0, and 0 where it is far from it."""
    return np.exp(-((x / width) ** 2))


def band(x, half, edge):
    """1 where x is between -half and half, 0 elsewhere, with soft edges."""
    return step(half - abs(x), edge)


def unit(x):
    return clip(x, 0, 1)


class Sheet:
    """One image: the body coordinates of its pixels, and strokes drawn in body coordinates."""

    def __init__(self, size: int, shot: Acquisition):
        self.size, self.shot = size, shot
        self.edge = max(0.012, 2.5 / size)  # the width of a sharp edge
        # undo the acquisition's shift, rotation and scale
        grid = (np.arange(size, dtype=float32) + 0.5) * 2 / size - 1
        x = grid[None] - float32(shot.shift[0])
        y = grid[:, None] - float32(shot.shift[1])
        cos, sin = (float32(f(shot.angle) / shot.scale) for f in (math.cos, math.sin))
        self.x, self.y = cos * x + sin * y, cos * y - sin * x
        self.a = abs(self.x)  # distance from the midline
        # y of what moves with the breath, where it is at rest
        longer = float32(shot.stretch / (1 + shot.stretch))
        self.rest_y = self.y - longer * (self.y - float32(APEX))

    def strokes(self, strokes, blur=0.0, least=0.9):
        """Draws strokes, 0 to 1, at least `least` pixels wide; `blur` is a length. They move with the breath."""
        # draw larger and reduce: this makes lines smooth
        factor = 4 if self.size < 300 else 2
        half = self.size * factor / 2
        canvas = Image.new("L", (self.size * factor,) * 2)
        draw = ImageDraw.Draw(canvas)
        # as complex numbers, points are turned and scaled by one product
        turn, shift = cmath.rect(self.shot.scale, self.shot.angle), complex(*self.shot.shift)
        stretch = self.shot.stretch
        # the brightest come last, on top of the others
        for stroke in sorted(strokes, key=lambda stroke: stroke.brightness):
            points = [turn * complex(x, y + stretch * (y - APEX)) + shift for x, y in stroke.points]
            pixels = [((point.real + 1) * half, (point.imag + 1) * half) for point in points]
            grey = min(255, round(255 * stroke.brightness))
            width = round(max(stroke.width * half, least * factor))
            draw.line(pixels, fill=grey, width=width, joint="curve")
        canvas = canvas.reduce(factor).filter(ImageFilter.GaussianBlur(blur * self.size / 2))
        return np.asarray(canvas, dtype=float32) / 255

    def wire(self, points, width):
        """Draws one line of metal or plastic."""
        # at this width the toy model, at 96 pixels, sees every tube; at 1.1, and fainter, it saw a quarter of them
        return self.strokes([Stroke(points, width)], least=1.75)


def frontal(body: Anatomy, present: dict[str, Finding], shot: Acquisition, size: int):
    """The attenuation of a frontal view, float32 [size, size], without noise and film curve."""
    sheet = Sheet(size, shot)
    x, y, a, edge, rest_y = sheet.x, sheet.y, sheet.a, sheet.edge, sheet.rest_y
    collapse, water, fluid, air_outside = (
        _severity(present, name, x > 0) for name in ("atelectasis", "edema", "pleural effusion", "pneumothorax")
    )

    # the rib cage: from its apices down, |x| of its wall and of the lungs' inner border
    top, centre = APEX, 0.31  # y and |x| of the apices
    t = unit((y - top) / 1.54)  # 0 at the apices, 1 at the base
    wider = (1 - (1 - t) ** 2.6) ** 0.45
    outer = centre + (body.chest - centre) * wider
    nearer = sqrt(1 - (1 - unit(t * 5)) ** 2)
    inner = centre - (centre - 0.06) * nearer
    u = clip(a / outer, 0, 1.2)  # 0 in the midline, 1 at the wall
    cage = step(outer - a, edge) * step(y - top, edge)

    # the diaphragm: y of the domes, and of the lungs' floor, which falls towards the wall
    right, left = body.diaphragm
    raised = 0.14 * collapse * np.minimum(a / 0.3, 1)
    dome = shot.breath + right + (left - right) * step(x, 0.5) - raised
    d = (a - 0.40) / (body.chest - 0.40)
    floor = dome + 0.05 * d**2 + 0.20 * clip(d, 0, 1.3) ** 3
    lung = cage * step(a - inner, edge) * step(floor - y, edge)

    # soft tissue: neck, shoulders and trunk, more of it in the middle and under the diaphragm
    slope = clip((a - 0.22) / 0.78, 0, 1.2)
    shoulder = -1.07 + 0.17 * sqrt(slope) + 0.26 * slope**2.2
    shoulder = np.where(a < 0.22, -1.2, shoulder)
    flank = body.body + 0.5 * step(-0.25 - y, 0.5)
    trunk = step(flank - a, 0.05) * step(y - shoulder, 0.09)
    round_trunk = sqrt(unit(1 - (a / (body.body + 0.08)) ** 2))
    depth = round_trunk * step(y + 0.95, 0.4)
    deeper = 0.10 + 0.16 * unit((y - floor) / 0.3)
    belly = np.maximum(step(y - floor, edge) * cage * deeper, 0.26 * step(y - 0.85, 0.3))
    film = trunk * (0.40 + 0.20 * depth + belly)
    if body.sex == "woman":
        breast = step(0.33 - hypot(a - 0.45, (y - 0.18) * 1.05), 0.04)
        film += 0.07 * trunk * breast * unit(0.5 + (y - 0.05) * 1.5)

    # heart and mediastinum take the place of air
    m = x - body.curve * np.sin(2.2 * y) + shot.turn  # distance from the spine's midline
    inside = _mediastinum(sheet, m, body, present)
    solid = step(inside, edge * 2.2)
    lung *= 1 - 0.45 * solid
    air = lung * (1 - solid * clip(0.35 + 1.6 * inside, 0.35, 0.8))
    darkness = 0.24 + 0.08 * unit((1 - u) * 4)
    film += 0.05 * solid * trunk - air * darkness

    # pneumothorax: the lung falls from the wall, most at the apex. Its edge is a line without vessels beyond it
    free = 0.0
    if "pneumothorax" in present:
        gap = 0.06 * (air_outside > 0) + 0.30 * air_outside
        from_wall = outer - gap * clip(1.2 - 0.7 * t, 0, 1) - a
        from_apex = (rest_y - top - 0.05 - 1.5 * gap) * 1.3
        within = -np.logaddexp(-16 * from_wall, -16 * from_apex) / 16  # a smooth minimum, positive in the lung
        affected = lung * (gap > 0)
        free = affected * step(-within, edge)
        pleura = affected * 0.11 * bump(within, max(0.012, 1.6 / size))
        film += pleura + 0.2 * gap * (affected - free) - 0.06 * free

    chest = {"u": u, "m": m, "outer": outer, "cage": cage, "trunk": trunk}
    film += _bones(sheet, body, **chest)

    # trachea, the two main bronchi, gas in the stomach
    trachea = band(m + 0.012, 0.036, 0.03)
    film -= 0.17 * trunk * trachea * step(-0.20 - y, 0.05)
    right_bronchus = Stroke([CARINA, (-0.13, -0.08)], 0.05)
    left_bronchus = Stroke([CARINA, (0.14, -0.06)], 0.045)
    film -= 0.08 * sheet.strokes([right_bronchus, left_bronchus], blur=0.015)
    dx, dy = (x - 0.42) / 0.17, (y - dome - 0.12 - raised) / 0.065
    bubble = step(1 - dx**2 - dy**2, 0.4) * (x > 0)
    film -= 0.22 * body.bubble * bubble * step(y - floor - 0.02, 0.03)

    # vessels, which edema widens and blurs; hila; the lungs' texture
    aerated = lung * (1 - free)
    wet = float(np.max(water))
    wider = 1 + 0.3 * wet
    vessels = [vessel._replace(width=vessel.width * wider) for vessel in body.vessels]
    tree = sheet.strokes(vessels, blur=0.004 + 0.008 * wet)
    film += (0.13 + 0.03 * wet) * tree * aerated * (1 - 0.7 * solid)
    hila = hypot((a - 0.17) * 1.1, rest_y + 0.02 + 0.05 * (x > 0))
    film += 0.09 * bump(hila, 0.085) * (1 - free)
    texture = 0
    for fx, fy, phase, height in body.waves:
        texture = texture + height * np.sin(fx * x + fy * rest_y + phase)
    film += 0.008 * texture * (0.5 + aerated)

    # findings that take the place of air
    if wet:
        # wings like a bat's around the hila, and septal lines
        wings = bump(hypot(a - 0.22, (rest_y - 0.05) / 1.25), 0.30 + 0.25 * wet)
        haze = 0.02 + 0.02 * wet + (0.08 + 0.22 * wet) * wings
        film += aerated * haze * (1 + 0.07 * texture)
        film += 0.13 * aerated * sheet.strokes(_septal_lines(body.chest, wet), blur=0.003)
    if "consolidation" in present:
        film += aerated * _consolidation(sheet, present["consolidation"], body.chest, texture)
    if "atelectasis" in present:
        base = 0.26 * collapse * bump(y - floor, 0.20)
        film += aerated * (_plates(a, y - dome, collapse) + base)
    if "nodule" in present:
        spot_x, spot_y = _zone(present["nodule"], 0.58 * body.chest)
        radius = 0.030 + 0.12 * present["nodule"].severity
        film += 0.27 * step(1 - hypot(x - spot_x, rest_y - spot_y) / radius, 0.35)
    if "pleural effusion" in present:
        # the fluid's surface is a meniscus, highest at the wall
        meniscus = 0.36 + 0.64 * np.minimum(u, 1) ** 3
        surface = 0.74 + shot.breath - (0.18 + 0.90 * fluid) * meniscus * (1 + shot.stretch)
        film += 0.42 * lung * (fluid > 0) * step(y - surface, 0.05 + 0.04 * fluid)

    return film + _devices(sheet, present, body.chest)


def _severity(present: dict[str, Finding], name: str, is_left: np.ndarray):
    """The severity of a finding in each pixel, by the patient's side; 0 where it is absent."""
    if name not in present:
        return float32(0)
    side, _, severity = present[name]
    left = float32(0 if side == "right" else severity)
    right = float32(0 if side == "left" else severity)
    return np.where(is_left, left, right)


def _mediastinum(sheet, m, body, present):
    """Heart, great vessels and spine, joined smoothly: the distance from their border, positive inside."""
    x, y, shot = sheet.x, sheet.rest_y, sheet.shot
    # a band around the spine; on the left the aortic arch and the pulmonary trunk bulge, at the top the neck
    neck = 0.03 * bump(y + 0.8, 0.2)
    arch = 0.075 * body.knob * bump(y + 0.38, 0.10)
    left = 0.125 + arch + 0.045 * bump(y + 0.13, 0.11) + neck
    right = 0.115 + 0.025 * bump(y + 0.3, 0.2) + neck
    band = np.where(m > 0, left, right) - abs(m)

    # in an AP view the heart is nearer to the tube, and so it is larger on the film
    scale = body.heart * (1.04 if shot.view == "AP" else 1.0)
    if "cardiomegaly" in present:
        scale *= 1.18 + 0.44 * present["cardiomegaly"].severity
    dx = x - 0.115 * scale - shot.turn
    dy = sheet.y - (0.27 - 0.04 * (scale - 1) + 0.7 * shot.breath)
    # two ellipses: the ventricles along the heart's axis, the right atrium upright
    along, across = dx * 0.86 + dy * 0.51, dy * 0.86 - dx * 0.51
    ventricles = hypot(along / (0.345 * scale), across / (0.26 * scale))
    from_midline = x + 0.025 * scale - shot.turn
    atrium = hypot(from_midline / (0.175 * scale), (dy + 0.03) / (0.23 * scale))
    heart = 0.25 * scale * (1 - np.minimum(ventricles, atrium))
    return np.logaddexp(22 * band, 22 * heart) / 22 - 0.008


def _bones(sheet, body, *, u, m, outer, cage, trunk):
    """Ribs, spine, clavicles, shoulder blades and the heads of the upper arms."""
    y, a, edge = sheet.y, sheet.a, sheet.edge
    is_ap = sheet.shot.view == "AP"
    # ribs: those behind fall to the side, those in front climb; and the wall, which the rays meet edge on
    fall = body.slope * (u**2.4 - 0.55 * u * (1 - u))
    behind = _ribs((y - fall + 0.72) / body.pitch, body.pitch, 10.5, edge)
    climb = 0.34 * unit(1 - u) ** 1.1
    phase = (y - climb + 0.56) / (body.pitch * 1.12)
    front = _ribs(phase, body.pitch, 7, edge) * 0.40
    film = cage * (behind * (0.55 + 0.45 * u) + front * step(u - 0.55, 0.3))
    wall = 0.10 * trunk * bump(a - outer, 0.022)
    film += wall * step(y + 0.76, 0.1) * step(0.95 - y, 0.2)
    # the spine: vertebrae with discs between them, and their pedicles
    disc = (y / 0.125) % 1
    vertebrae = band(m, 0.085 + 0.01 * y, edge)
    vertebrae *= 0.10 - 0.05 * bump(disc - 0.5, 0.16)
    film += vertebrae * (1 - 0.6 * step(y - 0.5, 0.3))
    film += 0.06 * bump(abs(m) - 0.062, 0.016) * bump(disc - 0.05, 0.22)
    # clavicles: an S from the breastbone to the shoulder
    along = unit((a - 0.1) / 0.7)
    wave = (0.02 if is_ap else 0.05) * np.sin(along * 2 * np.pi)
    collar = y - body.clavicle - 0.05 + 0.16 * along - wave  # distance from the bone's axis
    clavicle = band(collar, 0.030, edge)
    clavicle *= step(a - 0.09, 0.03)
    clavicle *= step(0.92 - a, 0.03)
    film += clavicle * (0.11 + 0.08 * bump(abs(collar) - 0.024, 0.012))
    # shoulder blades, which an AP view does not turn out of the lungs; heads of the upper arms
    blade = a - (0.78 if is_ap else 0.86) + 0.10 * (y + 0.45)
    scapula = 0.06 * step(blade, 0.03) + 0.05 * bump(blade - 0.02, 0.02)
    film += trunk * scapula * step(0.05 - y, 0.1) * step(collar, 0.1)
    arm = hypot(a - 1.05, y + 0.50)
    humerus = 0.05 * step(0.14 - arm, 0.04) + 0.05 * bump(arm - 0.13, 0.02)
    return film + trunk * humerus


def _ribs(phase, pitch, count, edge):
    """Bands where the phase is a whole number below `count`, brighter at their borders, as cortex is."""
    distance = abs((phase + 0.5) % 1 - 0.5) * pitch
    cortex = 0.062 + 0.042 * bump(distance - 0.027, 0.012)
    return band(distance, 0.033, edge * 0.8) * cortex * ((phase > -0.5) & (phase < count))


def _zone(finding: Finding, distance: float) -> tuple[float, float]:
    """The centre of a finding's zone, at this distance from the midline."""
    zone = finding.place.split()[0]
    return _sign(finding) * distance, {"upper": -0.42, "mid": -0.02, "lower": 0.26}[zone]


def _sign(finding: Finding) -> int:
    return 1 if finding.side == "left" else -1


def _consolidation(sheet, finding, chest, texture):
    """A ragged cloud, in which the bronchi are still dark with air."""
    severity, side = finding.severity, _sign(finding)
    x, y = _zone(finding, 0.56 * chest)
    radius = 0.10 + 0.28 * severity
    ragged = hypot(sheet.x - x, sheet.rest_y - y) / radius + 0.07 * texture
    # a bronchus from the hilum forks into three near the cloud's centre
    fork = (x - side * 0.06, y)
    bronchi = [Stroke([(side * 0.2, -0.02), fork], 0.014)]
    for dx, dy in ((0.5, -0.5), (0.65, 0.1), (0.4, 0.6)):
        end = (x + side * dx * radius, y + dy * radius)
        bronchi.append(Stroke([fork, end], 0.012))
    dark = 0.3 * sheet.strokes(bronchi, blur=0.007)
    return step(1 - ragged, 0.7) * (0.22 + 0.11 * severity) * (1 - dark)


def _plates(a, height, severity):
    """Linear atelectasis: bands over the dome. Severity makes them longer, thicker and more."""
    film = 0
    for row in range(3):
        along = (a - 0.44 - 0.03 * row) / (0.17 + 0.10 * severity)
        plate = bump(height + 0.05 + 0.10 * row - 0.03 * along, 0.021 + 0.015 * severity)
        plate *= band(along, 1, 0.6)
        film = film + plate * unit(6 * severity - 1.7 * row)
    return film * (0.24 + 0.04 * severity)


def _septal_lines(chest, severity):
    """Kerley's B lines: short and level, at the walls of both bases."""
    wall = chest - 0.03
    inner = wall - (0.11 + 0.05 * severity)
    lines = []
    for y in np.arange(0.46, 0.12, -0.055):
        for side in (-1, 1):
            lines.append([(side * inner, y), (side * wall, y + 0.01)])
    return [Stroke(points, 0.010, 0.5 + 0.5 * severity) for points in lines]


def _devices(sheet, present, chest):
    film = 0
    if "endotracheal tube" in present:
        film += 0.45 * sheet.wire(TUBE, 0.026)
    if "central line" in present:
        # down a jugular vein to the right atrium; from the left it crosses the midline
        side = _sign(present["central line"])
        path = [(side * x, y) for x, y in JUGULAR]
        if side > 0:
            path += [(0.06, -0.50), (-0.06, -0.42)]
        path += [(-0.105, -0.30), (-0.11, -0.02)]
        film += 0.42 * sheet.wire(_rounded(path), 0.016)
    if "pacemaker" in present:
        # a box below the clavicle, and a lead through the right atrium to the apex of the right ventricle
        side = _sign(present["pacemaker"])
        x, y = side * 0.72 * chest, -0.50
        dx, dy = (sheet.x - x) / 0.115, (sheet.rest_y - y) / 0.095
        outside = [(x - side * 0.08, y - 0.07), (side * 0.25, -0.62)]
        lead = _rounded([*outside, *LEAD])
        film += 0.75 * step(1 - (dx**4 + dy**4), 0.3)
        film += 0.42 * sheet.wire(lead, 0.014)
    return film


def _rounded(points):
    """Cut the corners of a polyline three times and keep its ends (Chaikin's algorithm)."""
    points = np.asarray(points)
    for _ in range(3):
        near = points[:-1] * 0.75 + points[1:] * 0.25
        far = points[:-1] * 0.25 + points[1:] * 0.75
        corners = np.stack((near, far), 1).reshape(-1, 2)  # near and far in turn
        points = np.concatenate((points[:1], corners, points[-1:]))
    return points.tolist()


def lateral(body: Anatomy, present: dict[str, Finding], shot: Acquisition, size: int):
    """The attenuation of a lateral view, float32 [size, size]; the patient faces the image's left."""
    sheet = Sheet(size, shot)
    x, y, edge, rest_y = sheet.x, sheet.y, sheet.edge, sheet.rest_y
    severity = lambda name: present[name].severity if name in present else 0.0

    # lungs between breastbone and spine, over the diaphragm; soft tissue around them
    bow = sqrt(unit(1 - ((y - 0.22) / 1.06) ** 2))
    front, back = -0.20 - 0.42 * bow - 0.10 * y, 0.22 + 0.50 * bow
    dome = 0.30 + shot.breath + 0.5 * (x + 0.25) ** 2
    floor = dome + 0.25 * unit(x) ** 3
    lung = step(x - front, edge * 2) * step(back - x, edge * 2)
    lung *= step(floor - y, edge)
    lung *= step(y + 0.70 + 0.3 * x, 0.12)
    skin = x - front + 0.14 + 0.08 * y
    trunk = step(skin, 0.06) * step(back + 0.16 - x, 0.06)
    depth = 0.52 + 0.10 * bow + 0.14 * step(y - floor, 0.08)
    film = trunk * (depth + 0.10 * step(-0.62 - y, 0.3))

    # what takes the place of air: heart, hila, findings
    scale = body.heart * (1 + 0.45 * severity("cardiomegaly"))
    heart = hypot((x + 0.27) / (0.35 * scale), (rest_y - 0.18) / (0.34 * scale))
    fill = 0.60 * step(1 - heart, 0.25)
    water = 0.5 * severity("edema") * bump(hypot(x, rest_y), 0.5)
    fill += 0.25 * bump(hypot(x - 0.02, rest_y + 0.08), 0.15) + water
    if "pleural effusion" in present:
        meniscus = 0.4 + 0.6 * unit((x + 0.2) / 0.8) ** 2
        rise = 0.9 * severity("pleural effusion") * meniscus * (1 + shot.stretch)
        fill += 0.9 * step(y - 0.80 - shot.breath + rise, 0.08)
    for name, radius in (("consolidation", 0.32), ("nodule", 0.09)):
        if name in present:
            _, height = _zone(present[name], 0)
            fill += 0.5 * step(1 - hypot(x - 0.15, rest_y - height) / radius, 0.5)
    film -= 0.34 * lung * unit(1 - fill)

    # spine, breastbone, ribs, trachea
    disc = ((y + 0.3 * x) / 0.14) % 1
    spine = trunk * band(x - back + 0.17, 0.085, edge)
    film += spine * (0.13 - 0.07 * bump(disc - 0.5, 0.15))
    breastbone = trunk * bump(x - front + 0.02, 0.025)
    film += 0.10 * breastbone * step(0.35 - y, 0.1)
    height = y - 0.45 * (x - 0.1) ** 2 + 0.3 * x + 0.7
    film += 0.5 * lung * _ribs(height / body.pitch, body.pitch, 10, edge)
    trachea = band(x - 0.03 - 0.12 * (y + 0.5), 0.04, 0.04)
    return film - 0.12 * trunk * trachea * step(-0.12 - y, 0.06)


def expose(film: np.ndarray, shot: Acquisition, rng: np.random.Generator):
    """Attenuation -> grey values, uint8 [size, size]."""
    size = len(film)
    # quantum noise in each pixel, and grain that is coarser
    film = film + rng.standard_normal(film.shape, dtype=float32) * float32(shot.noise)
    grain = Image.fromarray(rng.standard_normal((12, 12), dtype=float32))
    film += 0.6 * shot.noise * np.asarray(grain.resize(film.shape, Image.BICUBIC))
    # the film curve: a sigmoid, cut a little at both ends
    logit = 6.2 * shot.contrast * (film - 0.50 + shot.exposure)
    grey = unit(1 / (1 + np.exp(-logit)) * 1.06 - 0.035)
    # the shutters of the tube: black borders
    left, top, right, bottom = (round(size * part) for part in shot.crop)
    shown = np.zeros((size, size), dtype=np.uint8)
    shown[top : size - bottom, left : size - right] = (grey * 255 + 0.5)[top : size - bottom, left : size - right]
    image = Image.fromarray(shown)
    # the side marker
    letter, x = ("R", 0.05) if shot.marker < 0 else ("L", 0.95)
    font = ImageFont.load_default(0.07 * size)
    ImageDraw.Draw(image).text((x * size, 0.05 * size), letter, 235, font, anchor="mt")
    return np.asarray(image)
