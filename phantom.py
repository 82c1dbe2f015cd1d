"""A small hospital that can be drawn: chest X-ray phantoms over time, their reports, and questions about them.

Everything is a pure function of (seed, patient), so that any number of workers gives the same bytes: a patient has an
anatomy and a history of hidden states; a state has an image and a text. `write` lays them out as MIMIC-CXR is.

Drawing is additive, as attenuation is: parts are summed in body coordinates, x from -1 (image left, the patient's
right) to 1, y from -1 (top) to 1, and one film curve turns the sum into grey values.
"""

import csv
import gzip
import hashlib
import io
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import textwrap
import threading
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import date, timedelta
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from cli import atomic

# ------------------------------------------------------------------------------------- patients and their histories


@dataclass(frozen=True)
class Finding:
    """Of a device too, whose severity says nothing."""

    side: str | None  # "right", "left", "bilateral" (of the patient); None where there is none to name
    place: str | None
    severity: float  # 0 to 1


@dataclass(frozen=True)
class State:
    """The hidden state of one study, and the change of everything in it to the study before."""

    seed: int
    patient: int
    number: int  # 0: the patient's first
    subject_id: int
    study_id: int
    prior_study_id: int | None
    dicom_id: str  # the frontal image
    lateral_id: str | None
    view: str  # "AP" or "PA"
    date: date
    time: str  # hhmmss.mmm
    split: str
    present: dict[str, Finding]
    changes: dict[str, str]  # empty without a prior
    gone: dict[str, Finding]  # what has resolved or been removed, as it was


# name -> (sides, places); what is named in reports and drawn
FINDINGS = {
    "consolidation": (("right", "left"), ("upper lobe", "lower lobe")),
    "atelectasis": (("right", "left", "bilateral"), ("base",)),
    "edema": (("bilateral",), ("perihilar",)),
    "nodule": (("right", "left"), ("upper lung", "mid lung", "lower lung")),
    "pleural effusion": (("right", "left", "bilateral"), ("base",)),
    "pneumothorax": (("right", "left"), ("apex",)),
    "cardiomegaly": ((None,), (None,)),
}
DEVICES = {
    "endotracheal tube": ((None,), ("trachea",)),
    "central line": (("right", "right", "left"), ("superior vena cava",)),
    "pacemaker": (("left", "left", "right"), ("chest wall",)),
}
LEAST, STEP = 0.15, (0.20, 0.35)  # the smallest severity, and by how much it moves between two studies
LEVELS = (0.43, 0.72)  # from here moderate, from here large: too coarse to tell a change
SPLITS = ("train",) * 8 + ("validate", "test")


PURPOSES = (
    "anatomy", "history", "study", "AP", "PA", "LATERAL", "frontal noise", "lateral noise", "report", "pair questions",
    "image questions",
)  # fmt: skip


def generator(seed: int, patient: int, number: int, purpose: str) -> np.random.Generator:
    """The draws of one purpose for one study of one patient (number 0 where they are the patient's)."""
    key = [seed, patient, number, 1 + PURPOSES.index(purpose)]  # numpy takes no notice of a trailing 0
    return np.random.default_rng(key)


def subject_id(seed: int, patient: int) -> int:
    """10000032 and so on: a multiplier without a factor of 2 or 5 keeps the first 10 million patients apart."""
    return 10_000_000 + (32 + 7919 * seed + 6_180_339 * patient) % 10_000_000


def history(seed: int, patient: int) -> list[State]:
    """A patient's studies, first to last."""
    rng = generator(seed, patient, 0, "history")
    count = 1 + rng.choice(6, p=(0.20, 0.24, 0.22, 0.16, 0.10, 0.08))  # 2.96 on average: a third have no prior
    findings = rng.permutation(list(FINDINGS))[: rng.choice(4, p=(0.06, 0.40, 0.38, 0.16))].tolist()
    devices = rng.permutation(list(DEVICES))[: rng.choice(3, p=(0.50, 0.36, 0.14))].tolist()
    course = {name: _course(rng, name, count) for name in findings + devices}
    if {"pneumothorax", "pleural effusion"} <= course.keys():  # air above fluid would need a level of its own
        other = "left" if course["pneumothorax"][0].side == "right" else "right"
        course["pleural effusion"] = [Finding(other, f.place, f.severity) for f in course["pleural effusion"]]

    day, states = date(2110, 1, 1) + timedelta(int(rng.integers(0, 30000))), []
    for number in range(count):
        rng = generator(seed, patient, number, "study")
        was = states[-1].present if states else {}
        present = {name: steps[number] for name, steps in course.items() if steps[number].severity}
        gone = {name: finding for name, finding in was.items() if name not in present}
        changes = {name: _change(name, was.get(name), present.get(name)) for name in (*present, *gone) if number}
        ids = [_dicom_id(seed, patient, number, kind) for kind in ("frontal", "lateral")]
        view = "AP" if "endotracheal tube" in present or rng.random() < 0.4 else "PA"
        states.append(
            State(
                seed, patient, number, subject_id(seed, patient),
                study_id=50_000_000 + (414_267 + 7919 * seed + 3_819_661 * (8 * patient + number)) % 10_000_000,
                prior_study_id=states[-1].study_id if states else None,
                dicom_id=ids[0],
                lateral_id=ids[1] if view == "PA" and rng.random() < 0.6 else None,
                view=view,
                date=day,
                time="{:02}{:02}{:02}.{:03}".format(*(int(rng.integers(top)) for top in (24, 60, 60, 1000))),
                split=SPLITS[patient % 10],
                present=present,
                changes=changes,
                gone=gone,
            )
        )  # fmt: skip
        soon = rng.random() < (0.9 if view == "AP" else 0.35)
        day += timedelta(int(rng.integers(1, 8) if soon else rng.integers(8, 400)))
    return states


def _course(rng, name: str, count: int) -> list[Finding]:
    """One finding or device over all studies, severity 0 where it is absent.

    The direction of a step hardly depends on where it starts, and new ones start anywhere: a single image says little
    about the change.
    """
    sides, places = (FINDINGS | DEVICES)[name]
    side, place = (options[rng.integers(len(options))] for options in (sides, places))
    leaves = {"pacemaker": 0.0, "endotracheal tube": 0.3, "central line": 0.3}.get(name, 0.18)
    severity, steps = 0.0, []
    for _ in range(count):
        if not severity:
            severity = rng.uniform(LEAST, 1) if rng.random() < 0.5 else 0.0
        elif rng.random() < leaves:
            severity = 0.0
        elif name in FINDINGS:
            step, way = rng.uniform(*STEP), rng.integers(-1, 2)
            if not LEAST <= severity + way * step <= 1:
                way = -way
            severity += way * step
        steps.append(Finding(side, place, round(float(severity), 2)))
        severity = steps[-1].severity
    return steps


def _change(name: str, was: Finding | None, now: Finding | None) -> str:
    if was is None:
        return "new"
    if now is None:
        return "removed" if name in DEVICES else "resolved"
    return "unchanged" if was == now else "worse" if now.severity > was.severity else "improved"


def _dicom_id(*key) -> str:
    digest = hashlib.sha1(repr(key).encode()).hexdigest()
    return "-".join(digest[i : i + 8] for i in range(0, 40, 8))


# ---------------------------------------------------------------------------------------------------------- images


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


@lru_cache(64)
def anatomy(seed: int, patient: int) -> Anatomy:
    rng = generator(seed, patient, 0, "anatomy")
    chest = rng.uniform(0.74, 0.82)
    right = rng.uniform(0.40, 0.50)
    return Anatomy(
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


def acquisition(seed: int, patient: int, number: int, view: str) -> Acquisition:
    rng = generator(seed, patient, number, view)
    portable = 1.6 if view == "AP" else 1.0
    return Acquisition(
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
    severity = {name: _severity(present, name, x > 0) for name in FINDINGS}  # 0 where absent, [size, size] by side

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
    ImageDraw.Draw(image).text((marker[1] * size, 0.05 * size), marker[0], 235, _font(0.07 * size), anchor="mt")
    return np.asarray(image)


@lru_cache
def _font(size: float):
    return ImageFont.load_default(size)


def study(seed: int, patient: int, number: int, size: int = 128) -> tuple[State, np.ndarray, str]:
    """One study: its hidden state, its frontal image uint8 [size, size] and its report."""
    state = history(seed, patient)[number]
    return state, picture(state, state.view, size), report(state)


def picture(state: State, view: str, size: int) -> np.ndarray:
    """One image of a study, uint8 [size, size]; view "AP", "PA" or "LATERAL"."""
    shot = acquisition(state.seed, state.patient, state.number, view)
    draw, noise = (lateral, "lateral noise") if view == "LATERAL" else (frontal, "frontal noise")
    film = draw(anatomy(state.seed, state.patient), state.present, shot, size)
    return expose(film, shot, generator(state.seed, state.patient, state.number, noise))


# ----------------------------------------------------------------------------------------------------------- reports

SIZES = {  # words of severity
    "consolidation": ("small", "moderate", "large"),
    "atelectasis": ("mild", "moderate", "severe"),
    "edema": ("mild", "moderate", "severe"),
    "nodule": ("small", "moderate", "large"),
    "pleural effusion": ("small", "moderate", "large"),
    "pneumothorax": ("small", "moderate", "large"),
    "cardiomegaly": ("mild", "moderate", "severe"),
}
NOUNS = {
    "consolidation": "{side} {place} consolidation",
    "atelectasis": "{side} basilar atelectasis",
    "edema": "pulmonary edema",
    "nodule": "{side} {place} nodule",
    "pleural effusion": "{side} pleural effusion",
    "pneumothorax": "{side} apical pneumothorax",
    "cardiomegaly": "cardiomegaly",
    "endotracheal tube": "endotracheal tube",
    "central line": "{side} central line",
    "pacemaker": "{side} chest wall pacemaker",
}
UNCOUNTABLE = ("atelectasis", "edema", "cardiomegaly")
SENTENCES = {  # {noun} with its word of severity, {bare} without; one word of change each
    "present": ("There {be} {a}{noun}.", "{a}{noun} {be} seen."),
    "new": ("There {be} {a_new}{noun}.", "{a_new}{noun} {be} seen."),
    "worse": ("The {noun} {have} {more}.", "{a}{noun} {have} {more} since the prior study."),
    "unchanged": ("The {noun} {be} unchanged.", "{a}{noun} {be} unchanged from the prior study."),
    "improved": ("The {noun} {have} {less}.", "{a}{noun} {have} {less} since the prior study."),
    "resolved": ("The {bare} {have} resolved.", "The previously seen {bare} {have} resolved."),
    "removed": ("Interval removal of the {bare}.", "There has been removal of the {bare}."),
}
IMPRESSIONS = {
    "present": "{noun}", "new": "New {noun}", "worse": "{more} {noun}", "unchanged": "Unchanged {noun}",
    "improved": "{less} {noun}", "resolved": "Resolved {bare}",
}  # fmt: skip
EXAMINATIONS = {  # view, with a lateral one -> examination, technique
    ("AP", False): ("CHEST (PORTABLE AP)", "Portable AP view of the chest was obtained."),
    ("PA", False): ("CHEST (PA)", "Single PA view of the chest was obtained."),
    ("PA", True): ("CHEST (PA AND LAT)", "PA and lateral views of the chest were obtained."),
}
SYMPTOMS = (
    "shortness of breath", "cough", "fever", "chest pain", "hypoxia", "dyspnea on exertion", "altered mental status",
    "tachycardia", "recent fall", "weakness",
)  # fmt: skip
PAST = ("Hypertension.", "Diabetes.", "Coronary artery disease.", "COPD.", "Renal failure.", "Lymphoma.", "Smoking.")


def report(state: State) -> str:
    """The report as the hospital stores it: every line begins with a space, "___" stands for what was taken out."""
    rng = generator(state.seed, state.patient, state.number, "report")
    pick = lambda options: options[rng.integers(len(options))]
    sex = anatomy(state.seed, state.patient).sex
    age = pick(("___ year old", "___-year-old", "___F" if sex == "woman" else "___M"))
    who = age if len(age) == 4 else f"{age} {sex}"
    reason = f"{who} with {pick(SYMPTOMS)}{pick(('.', '  // ___', '  // evaluate for interval process'))}"
    layout = pick(("INDICATION",) * 4 + ("HISTORY", "both"))
    examination, technique = EXAMINATIONS[state.view, state.lateral_id is not None]
    parts = {"EXAMINATION": examination, "HISTORY" if layout == "HISTORY" else "INDICATION": reason}
    if layout == "both":
        parts["HISTORY"] = pick(PAST)
    parts["TECHNIQUE"] = technique
    earlier = ("Chest radiograph ___.", "Prior study dated ___.")
    parts["COMPARISON"] = pick(earlier if state.number else ("None.", "None available."))
    text = f"{' ' * 33}FINAL REPORT\n"
    for name, body in parts.items():
        text += _wrap(f"{name}:  {body}") + " \n"
    text += " FINDINGS:  \n \n" + _wrap(" ".join(_findings(state, pick))) + " \n"
    return text + " IMPRESSION:  \n \n" + "".join(map(_wrap, _impression(state, pick)))


def _wrap(line: str) -> str:
    lines = textwrap.wrap(line, 78, break_long_words=False, break_on_hyphens=False)
    return "".join(f" {part}\n" for part in lines)


def _level(name: str, finding: Finding) -> str:
    return SIZES[name][sum(finding.severity >= limit for limit in LEVELS)]


def _say(template: str, name: str, finding: Finding) -> str:
    """A template filled with one finding's words, beginning with a capital."""
    many = name == "pleural effusion" and finding.side == "bilateral"
    one = not many and name not in UNCOUNTABLE
    bare = NOUNS[name].format(side=finding.side, place=finding.place) + "s" * many
    noun = f"{_level(name, finding)} {bare}" if name in FINDINGS else bare
    article = ("an " if noun[0] in "aeiou" else "a ") * one
    dense = name in ("edema", "consolidation")  # these worsen, the others increase
    text = template.format(
        noun=noun,
        bare=bare,
        a=article,
        a_new="a " * one + "new ",
        be="are" if many else "is",
        have="have" if many else "has",
        more="worsened" if dense else "increased",
        less="improved" if dense else "decreased",
    )
    return text[0].upper() + text[1:]


def _findings(state: State, pick) -> list[str]:
    """Sentences: devices, lungs, pleura, heart; what is absent is denied unless its going has just been told."""
    named = state.present | state.gone
    say = lambda name: _say(pick(SENTENCES[state.changes.get(name, "present")]), name, named[name])
    lungs, pleura = ("consolidation", "atelectasis", "edema", "nodule"), ("pleural effusion", "pneumothorax")
    sentences = [say(name) for name in (*DEVICES, *lungs) if name in named]
    if not any(name in named for name in lungs):
        sentences.append(pick(("The lungs are clear.", "Both lungs are well aerated and clear.")))
    elif "consolidation" not in named:
        sentences.append(pick(("No focal consolidation.", "There is no focal consolidation.")))
    sentences += [say(name) for name in pleura if name in named]
    absent = " or ".join(name for name in pleura if name not in named)
    if absent:
        sentences.append(pick((f"No {absent}.", f"There is no {absent}.", f"No {absent} is seen.")))
    normal = ("The heart size is normal.", "The cardiac silhouette is normal in size.", "Heart size is normal.")
    sentences.append(say("cardiomegaly") if "cardiomegaly" in named else pick(normal))
    sentences.append(pick(("The mediastinal and hilar contours are unremarkable.", "Mediastinal contours are normal.")))
    sentences.append(pick(("The bones are intact.", "No acute fracture.", "Osseous structures are unremarkable.")))
    return sentences


def _impression(state: State, pick) -> list[str]:
    named = state.present | state.gone
    say = lambda name: _say(IMPRESSIONS[state.changes.get(name, "present")] + ".", name, named[name])
    lines = [say(name) for name in FINDINGS if name in named]
    if not lines:
        return [pick(("No acute cardiopulmonary process.", "No acute intrathoracic abnormality."))]
    return [f"{i}. {line}" for i, line in enumerate(lines, 1)] if len(lines) > 1 else lines


WORDS = {  # word of change -> change
    "new": "new", "increased": "worse", "worsened": "worse", "unchanged": "unchanged",
    "decreased": "improved", "improved": "improved", "resolved": "resolved", "removal": "removed",
}  # fmt: skip


def mentioned(text: str) -> dict[str, str]:
    """What a findings text says is there or was: name -> its change, "present" where no change is said.

    It reads what a model trained on these reports writes; text that says nothing gives an empty dict.
    """
    said = {}
    for sentence in " ".join(text.lower().split()).split("."):
        words = re.findall(r"[a-z]+", sentence)
        if "no" not in words:
            change = next((WORDS[word] for word in words if word in WORDS), "present")
            said.update({name: change for name in FINDINGS | DEVICES if re.search(rf"\b{name}", sentence)})
    return said


# --------------------------------------------------------------------------------------------------------- questions

DIFFERENCES = {
    "new": "the main image has an additional finding of {name}",
    "resolved": "the finding of {name} of the reference image is missing in the main image",
    "removed": "the {name} of the reference image is missing in the main image",
    "worse": "the {name} is worse in the main image than in the reference image",
    "improved": "the {name} is better in the main image than in the reference image",
}


def pair_questions(state: State) -> list[tuple[str, str, str]]:
    """(type, question, answer) about a study and its prior, in the manner of Diff-VQA; none without a prior."""
    if state.prior_study_id is None:
        return []
    rng = generator(state.seed, state.patient, state.number, "pair questions")
    found = {name: finding for name, finding in state.present.items() if name in FINDINGS}
    told = [DIFFERENCES[change].format(name=name) for name, change in state.changes.items() if change != "unchanged"]
    asked = {*list(found)[:1], list(FINDINGS)[rng.integers(len(FINDINGS))]}
    rows = [
        ("difference", "what has changed compared to the reference image?", ", ".join(told) or "nothing has changed"),
        ("abnormality", "what abnormalities are seen in the image?", ", ".join(found) or "no abnormality"),
        ("view", "from which view was the image taken?", f"{state.view} view"),
    ]
    rows += [
        ("presence", f"is there evidence of {name} in the image?", "yes" if name in found else "no")
        for name in FINDINGS
        if name in asked
    ]
    for name, finding in found.items():
        rows.append(("level", f"what level is the {name}?", _level(name, finding)))
        if finding.side:
            rows.append(("location", f"where in the image is the {name}?", f"{finding.side} {finding.place}"))
    if "edema" in found:  # septal lines come first, then the alveoli fill
        kind = "interstitial" if found["edema"].severity < 0.5 else "alveolar"
        rows.append(("type", "what type is the edema?", kind))
    return rows


def image_questions(state: State) -> list[tuple[str, str, str, list[str]]]:
    """(semantic type, content type, question, answers) about one image, in the manner of CXR-VQA."""
    rng = generator(state.seed, state.patient, state.number, "image questions")
    name = [*FINDINGS, *DEVICES][rng.integers(len(FINDINGS) + len(DEVICES))]
    found, devices = ([name for name in state.present if name in group] for group in (FINDINGS, DEVICES))
    sex = {"woman": "female", "man": "male"}[anatomy(state.seed, state.patient).sex]
    large = "cardiomegaly" in found
    rows = [
        ("verify", "presence", f"is {name} present in this image?", ["yes" if name in state.present else "no"]),
        ("query", "abnormality", "list all abnormalities of this image.", found),
        ("query", "attribute", "which devices are seen in this image?", devices),
        ("choose", "plane", "is this image an AP or a PA view?", [state.view]),
        ("query", "gender", "what is the gender of the patient?", [sex]),
        ("verify", "size", "is the heart wider than half of the chest?", ["yes" if large else "no"]),
    ]
    for name in found:
        side = state.present[name].side
        if side:
            sides = [f"{one} lung" for one in ("right", "left") if side in (one, "bilateral")]
            rows.append(("query", "anatomy", f"which lungs show {name}?", sides))
    return rows


# ------------------------------------------------------------------------------------------------------------- files


def write(out, patients: int, seed: int = 0, size: int = 128, workers: int | None = None, dicom: bool = False,
          progress=lambda done, total: None):  # fmt: skip
    """Lay the hospital out as MIMIC-CXR is; ValueError where `out` holds something else.

    A patient's folder appears when all in it is on the disk, and is then left alone: a rerun makes what is missing, and
    more patients may be asked for. dicom adds a .dcm beside each .jpg. progress is called with counts of patients.
    """
    for name, value, least, most in (
        ("patients", patients, 1, 10**6),
        ("seed", seed, 0, 2**31),
        ("size", size, 32, 4096),
    ):
        if not least <= value <= most:
            raise ValueError(f"{name} {value} is out of range: give {least} to {most}")
    out, settings = Path(out), {"seed": seed, "size": size, "dicom": dicom}
    mark = out / "phantom.json"
    if mark.exists():
        if json.loads(mark.read_text()) != settings:
            raise ValueError(f"{mark} says {mark.read_text().strip()}, not {json.dumps(settings)}: give another folder")
    elif out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty and was not begun by this program: give another folder")
    out.mkdir(parents=True, exist_ok=True)
    with atomic(mark) as file:
        file.write(json.dumps(settings) + "\n")

    missing = [patient for patient in range(patients) if not _folder(out / "files", subject_id(seed, patient)).exists()]
    job, done = partial(_write_patient, out, seed, size, dicom), patients - len(missing)
    with ExitStack() as stack:
        run = map
        if workers != 1 and len(missing) > 1:
            spawn = multiprocessing.get_context("spawn")  # a fork would copy its parent's threads' locks
            pool = ProcessPoolExecutor(workers or os.cpu_count(), mp_context=spawn, initializer=_follow_parent)
            run = partial(stack.enter_context(pool).map, chunksize=4)
        for _ in run(job, missing):
            done += 1
            progress(done, patients)
    _write_tables(out, patients, seed, size)


def _follow_parent():
    """In a worker: leave Ctrl-C to the parent, and end when it has ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _folder(files: Path, subject: int) -> Path:
    return files / f"p{str(subject)[:2]}" / f"p{subject}"


def _views(state: State) -> list[tuple[str, str]]:
    """(dicom id, view) of a study's images."""
    return [(state.dicom_id, state.view)] + ([(state.lateral_id, "LATERAL")] if state.lateral_id else [])


def _write_patient(out: Path, seed: int, size: int, dicom: bool, patient: int):
    folder = _folder(out / "files", subject_id(seed, patient))
    unfinished = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed
    try:
        for state in history(seed, patient):
            study = unfinished / f"s{state.study_id}"
            study.mkdir(parents=True)
            _save(study.with_suffix(".txt"), report(state).encode())
            for dicom_id, view in _views(state):
                pixels, file = picture(state, view, size), io.BytesIO()
                Image.fromarray(pixels).save(file, "JPEG", quality=95)
                _save(study / f"{dicom_id}.jpg", file.getvalue())
                if dicom:
                    _save(study / f"{dicom_id}.dcm", _dicom(pixels, state, dicom_id, view))
        unfinished.rename(folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _save(path: Path, data: bytes):
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _dicom(pixels: np.ndarray, state: State, dicom_id: str, view: str) -> bytes:
    """An X-ray object of 8 bits, MONOCHROME2, whose uids follow from its ids."""
    try:
        from pydicom.dataset import FileDataset, FileMetaDataset
        from pydicom.uid import DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian
    except ImportError:
        raise ValueError("DICOM output needs pydicom: pip install pydicom") from None
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = DigitalXRayImageStorageForPresentation
    meta.MediaStorageSOPInstanceUID = f"2.25.{int(dicom_id.replace('-', '')[:32], 16)}"
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    data.StudyInstanceUID, data.SeriesInstanceUID = f"2.25.{state.study_id}", f"2.25.{state.study_id}.1"
    data.PatientID, data.StudyID = str(state.subject_id), str(state.study_id)
    data.Modality, data.ViewPosition = "DX", view
    data.StudyDate, data.StudyTime = state.date.strftime("%Y%m%d"), state.time
    data.Rows, data.Columns = pixels.shape
    data.SamplesPerPixel, data.PhotometricInterpretation, data.PixelRepresentation = 1, "MONOCHROME2", 0
    data.BitsAllocated, data.BitsStored, data.HighBit = 8, 8, 7
    data.PixelData = pixels.tobytes() + b"\0" * (pixels.size % 2)
    file = io.BytesIO()
    data.save_as(file, enforce_file_format=True)
    return file.getvalue()


METADATA = (
    "dicom_id", "subject_id", "study_id", "PerformedProcedureStepDescription", "ViewPosition", "Rows", "Columns",
    "StudyDate", "StudyTime", "ProcedureCodeSequence_CodeMeaning", "ViewCodeSequence_CodeMeaning",
    "PatientOrientationCodeSequence_CodeMeaning",
)  # fmt: skip
VIEW_CODES = {"AP": "antero-posterior", "PA": "postero-anterior", "LATERAL": "lateral"}


def _write_tables(out: Path, patients: int, seed: int, size: int):
    """Everything beside the folder of files, streamed: no more than one patient is in memory."""
    with ExitStack() as stack:
        text = lambda name: stack.enter_context(atomic(out / name))
        table = lambda file: csv.writer(file, lineterminator="\n").writerow

        def packed(name):
            raw = stack.enter_context(atomic(out / name, "wb"))
            zipped = stack.enter_context(gzip.GzipFile("", "wb", fileobj=raw, mtime=0))  # no name, no time
            return table(stack.enter_context(io.TextIOWrapper(zipped, encoding="utf-8", newline="")))

        metadata, split = packed("mimic-cxr-2.0.0-metadata.csv.gz"), packed("mimic-cxr-2.0.0-split.csv.gz")
        pairs, truth = table(text("mimic_pair_questions.csv")), text("truth.jsonl")
        images = {name: text(f"cxr_vqa_{name.replace('validate', 'valid')}.json") for name in dict.fromkeys(SPLITS)}
        metadata(METADATA)
        split(("dicom_id", "study_id", "subject_id", "split"))
        pairs(("study_id", "subject_id", "ref_id", "question_type", "question", "answer", "split"))
        begun = set()
        for patient in range(patients):
            for state in history(seed, patient):
                ids = (state.study_id, state.subject_id)
                step, day = EXAMINATIONS[state.view, state.lateral_id is not None][0], f"{state.date:%Y%m%d}"
                for dicom_id, view in _views(state):
                    metadata((dicom_id, state.subject_id, state.study_id, step, view, size, size, day, state.time, step,
                              VIEW_CODES[view], "Erect"))  # fmt: skip
                    split((dicom_id, *ids, state.split))
                for row in pair_questions(state):
                    pairs((*ids, state.prior_study_id, *row, state.split.replace("validate", "val")))
                file = images[state.split]
                path = _folder(Path(), state.subject_id) / f"s{state.study_id}" / f"{state.dicom_id}.jpg"
                for semantic, content, question, answer in image_questions(state):
                    file.write(",\n" if state.split in begun else "[\n")
                    begun.add(state.split)
                    record = {"subject_id": state.subject_id, "study_id": state.study_id, "image_id": state.dicom_id,
                              "image_path": path.as_posix(), "question": question, "semantic_type": semantic,
                              "content_type": content, "answer": answer}  # fmt: skip
                    file.write(json.dumps(record))
                truth.write(json.dumps(_truth(state)) + "\n")
        for name, file in images.items():
            file.write("\n]\n" if name in begun else "[]\n")


def _truth(state: State) -> dict:
    where = lambda finding: {"side": finding.side, "place": finding.place}
    findings = {k: where(f) | {"severity": f.severity} for k, f in state.present.items() if k in FINDINGS}
    devices = {k: where(f) for k, f in state.present.items() if k in DEVICES}
    ids = {"subject_id": state.subject_id, "study_id": state.study_id, "dicom_id": state.dicom_id}
    return ids | {
        "prior_study_id": state.prior_study_id, "view": state.view, "split": state.split, "findings": findings,
        "devices": devices, "changes": state.changes,
    }  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- preview

INK, PAPER, FAINT = "#e6e8ea", "#14171a", "#8b949e"
COLOURS = {
    "new": "#f0b849", "worse": "#ff7b72", "unchanged": "#79b8ff", "improved": "#7ee787", "resolved": "#7ee787",
    "removed": "#d2a8ff",
}  # fmt: skip


def preview(seed: int = 0, patients: int = 3, studies: int = 4, size: int = 320) -> Image.Image:
    """A contact sheet: a row for a patient, a column for a study, each image above the findings of its report.

    Patients are chosen so that together they show as many findings and changes as they can; words of change are
    coloured. size is an image's side in pixels.
    """
    shown, rows = set(), []
    pool = [states for states in map(partial(history, seed), range(100 * patients)) if len(states) >= studies]
    kinds = lambda states: {
        kind
        for state in states[:studies]
        for name in state.present | state.gone
        for kind in (name, (name in DEVICES, state.changes.get(name)))
    }
    while pool and len(rows) < patients:
        best = max(pool, key=lambda states: len(kinds(states) - shown))
        shown |= kinds(best)
        pool.remove(best)
        rows.append(best[:studies])

    unit = size / 20
    small, text = _font(0.85 * unit), _font(0.95 * unit)
    gap, line = round(1.2 * unit), round(1.3 * unit)
    findings = lambda state: report(state).split(" FINDINGS:")[1].split(" IMPRESSION:")[0]
    cells = [[_paragraph(findings(state), text, size) for state in states] for states in rows]
    heights = [round(size + line * (4.4 + max(map(len, row)))) for row in cells]
    sheet = Image.new("RGB", (gap + studies * (size + gap), sum(heights) + gap), PAPER)
    draw, top = ImageDraw.Draw(sheet), gap
    for states, row, height in zip(rows, cells, heights, strict=True):
        sex = anatomy(seed, states[0].patient).sex
        draw.text((gap, top), f"Patient {states[0].subject_id}", INK, text)
        left = gap + text.getlength(f"Patient {states[0].subject_id}") + unit / 2
        draw.text((left, top), f"a {sex}, {len(states)} studies", FAINT, text)
        for column, (state, lines) in enumerate(zip(states, row, strict=True)):
            x, y = gap + column * (size + gap), top + 1.6 * line
            days = (state.date - states[column - 1].date).days if column else 0
            when = f"{days} day{'s' * (days != 1)} later" if column else "first study"
            draw.text((x, y), f"{state.view}, {when}", FAINT, small)
            y += 1.1 * line
            sheet.paste(Image.fromarray(picture(state, state.view, size)), (x, round(y)))
            y += size + 0.4 * line
            for words in lines:
                across = x
                for word in words:
                    stem = word.rstrip(".")
                    draw.text((across, y), stem, COLOURS.get(WORDS.get(stem.lower()), INK), text)
                    draw.text((across + text.getlength(stem), y), word[len(stem) :], INK, text)
                    across += text.getlength(word + " ")
                y += line
        top += height
    return sheet


def _paragraph(text: str, font, width: float) -> list[list[str]]:
    """Lines of words that fit."""
    lines = [[]]
    for word in text.split():
        if font.getlength(" ".join([*lines[-1], word])) > width:
            lines.append([])
        lines[-1].append(word)
    return lines
