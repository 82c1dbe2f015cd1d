"""The log of a training run: lines on stdout, log.jsonl, run.json, loss.svg, and other trackers if asked for."""

import importlib
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from plumbing.distributed import World
from plumbing.files import atomic

PEAK_FLOPS = {  # part of a GPU's name -> dense FLOP/s in bfloat16, from the makers' data sheets
    "A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "L40S": 362e12, "A6000": 155e12,
    "3090": 71e12, "4090": 165e12, "5090": 210e12, "MI300X": 1307e12,
}  # fmt: skip
TRACKERS = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}  # -> its Python module
LINE = "step {step}/{steps} loss {loss:.4f} lr {lr:.2e} norm {norm:.3f} {positions_per_second:,.0f} positions/s "
LINE += "waiting {waiting:.0%}"
SVG = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 390" style="font: 13px sans-serif" fill="#888">'
COLOURS = ("#0b7285", "#e8590c", "#5f3dc4", "#2b8a3e")


@dataclass
class Log:
    """The log of one run. Every rank calls its methods; rank 0 writes."""

    config: object  # the run's dataclass, with out_dir, log_every and report_to
    world: World
    first_step: int  # steps done before a resume
    num_steps: int
    flops_per_position: int

    def __post_init__(self):
        self.out = Path(self.config.out_dir)
        self.file = self.out / "log.jsonl"
        # counted since the last line
        self.start, self.positions, self.waited = time.monotonic(), 0, 0.0
        if self.world.rank != 0:
            return

        # steps behind the checkpoint will be logged again, and a full disk may have torn the last line
        self.out.mkdir(parents=True, exist_ok=True)
        old = self.file.read_text().splitlines() if self.first_step and self.file.exists() else []
        with atomic(self.file) as file:
            for line in old:
                if line.endswith("}") and json.loads(line)["step"] <= self.first_step:
                    file.write(line + "\n")
        with atomic(self.out / "run.json") as file:
            json.dump(asdict(self.config), file, indent=1)
        self.trackers = [open_tracker(name, self.config) for name in self.config.report_to]

    def step(self, step: int, values: dict, positions: int, waited: float):
        """Call this after a step: its loss, lr and norm, the rank's positions, and its seconds of waiting so far."""
        self.positions += positions
        if step % self.config.log_every != 0 and step != self.num_steps:
            return
        # 1) rates since the last line
        (positions,) = self.world.all_reduce(self.positions)
        seconds = time.monotonic() - self.start
        values["positions_per_second"] = positions / seconds
        values["waiting"] = (waited - self.waited) / seconds
        minutes = (self.num_steps - step) * seconds / (step - self.first_step) / 60
        self.start, self.positions, self.waited = time.monotonic(), 0, waited
        self.first_step = step
        if self.world.rank != 0:
            return
        # 2) the share of the GPUs' peak (MFU), if that is known
        line = LINE.format(step=step, steps=self.num_steps, **values)
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
        for chip, peak in PEAK_FLOPS.items():
            if chip in gpu:
                values["mfu"] = self.flops_per_position * positions / seconds / peak / self.world.size
                line += f" MFU {values['mfu']:.0%}"
        print(f"{line} {minutes:.0f} min left", flush=True)
        self._write(step, values)

    def scores(self, step: int, scores: dict):
        """Call this after a validation."""
        if self.world.rank == 0:
            print(f"step {step} validation:", ", ".join(f"{name} {value:.4f}" for name, value in scores.items()))
            self._write(step, {f"validation {name}": value for name, value in scores.items()})

    def _write(self, step: int, values: dict):
        with open(self.file, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step} | values) + "\n")
        for track in self.trackers:
            track(values, step)

    def plot_loss(self):
        """Draws loss.svg from log.jsonl."""
        entries = [json.loads(line) for line in self.file.read_text().splitlines()]
        lines = {}
        for label, name in (("training", "loss"), ("validation", "validation loss")):
            points = [(entry["step"], entry[name]) for entry in entries if name in entry]
            if points:
                lines[label] = points
        with atomic(self.out / "loss.svg") as file:
            file.write(curves("loss", "step", lines))


def open_tracker(name: str, config):
    """Returns a tracker's function (values, step). Raises ValueError if its package is not installed."""
    try:
        module = importlib.import_module(TRACKERS[name])
    except ImportError:
        raise ValueError(f"report_to names {name}: pip install {name}") from None
    if name == "wandb":
        return module.init(project="nanolibra", dir=config.out_dir, config=asdict(config)).log
    writer = module.SummaryWriter(config.out_dir)
    return lambda values, step: [writer.add_scalar(key, value, step) for key, value in values.items()]


def curves(title: str, unit: str, lines: dict[str, list]) -> str:
    """Draws lines as an SVG picture with a logarithmic y axis. lines: label -> [(x, y), …]."""
    # 1) points (x, log y) -> pixels; the plot's corners are (60, 340) and (700, 40)
    logs = {label: [(x, math.log(max(y, 1e-9))) for x, y in line] for label, line in lines.items()}
    points = np.concatenate(list(logs.values()))  # [all points, 2]
    low = points.min(axis=0)
    span = np.maximum(points.max(axis=0) - low, 1e-9)
    to_pixels = lambda points: (60, 340) + (640, -300) * (points - low) / span
    # 2) five ticks on each axis
    text = '<text x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>'.format
    parts = [text(60, 22, "start", title), text(700, 380, "end", unit)]
    for tick in np.linspace(low, low + span, 5):
        x, y = to_pixels(tick)
        parts.append(f'<path d="M60 {y:.1f}H700" stroke="#8886"/>')
        parts.append(text(52, y + 4, "end", f"{math.exp(tick[1]):.3g}"))
        parts.append(text(x, 360, "middle", f"{tick[0]:,.0f}"))
    # 3) the lines, and their labels one below the other
    for number, (label, line) in enumerate(logs.items()):
        colour = COLOURS[number % len(COLOURS)]
        pixels = " ".join(f"{x:.1f},{y:.1f}" for x, y in to_pixels(line))
        parts.append(f'<polyline points="{pixels}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        parts.append(f'<g fill="{colour}">{text(690, 60 + 18 * number, "end", label)}</g>')
    return "\n".join([SVG, *parts, "</svg>\n"])
