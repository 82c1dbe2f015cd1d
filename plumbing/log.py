"""The log of a training run: lines on stdout, log.jsonl, run.json, loss.svg, and other trackers if asked for."""

import html
import json
import math
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from plumbing.distributed import World
from plumbing.files import atomic

PEAK_FLOPS = {  # part of a GPU's name -> dense FLOP/s in bfloat16, from the makers' data sheets
    "A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "L40S": 362e12, "A6000": 155e12,
    "3090": 71e12, "4090": 165e12, "5090": 210e12, "MI300X": 1307e12,
}  # fmt: skip
LINE = "step {step}/{steps} loss {loss:.4f} lr {lr:.2e} norm {norm:.3f} {positions_per_second:,.0f} positions/s "
LINE += "waiting {waiting:.0%}"
TRACKERS = ("tensorboard", "wandb")
SVG = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 390" font-family="sans-serif" font-size="13">'
COLOURS = ("#0b7285", "#e8590c", "#5f3dc4", "#2b8a3e")


class Log:
    """The log of one run. Rank 0 writes it; the other ranks contribute their numbers."""

    def __init__(self, config, world: World, *, first_step: int, num_steps: int, flops_per_position: int):
        """config: a run's dataclass with out_dir, log_every and report_to. first_step: steps done before a resume."""
        self.config, self.world = config, world
        self.num_steps, self.flops_per_position = num_steps, flops_per_position
        self.out = Path(config.out_dir)
        self.file = self.out / "log.jsonl"
        self._start_line(first_step, waited=0.0)
        if world.rank != 0:
            return

        # steps behind the checkpoint will be logged again, and a full disk may have torn the last line
        self.out.mkdir(parents=True, exist_ok=True)
        old = self.file.read_text().splitlines() if first_step and self.file.exists() else []
        with atomic(self.file) as file:
            for line in old:
                if line.endswith("}") and json.loads(line)["step"] <= first_step:
                    file.write(line + "\n")
        settings = asdict(config)
        with atomic(self.out / "run.json") as file:
            json.dump(settings, file, indent=1)
        self.trackers = [open_tracker(name, self.out, settings) for name in config.report_to]

    def step(self, step: int, values: dict[str, float], positions: int, waited: float):
        """Every rank calls this after a step. values: loss, lr, norm. positions: what this rank computed in the step.

        waited: seconds that this rank has waited for data since the run started.
        """
        self.positions += positions
        if step % self.config.log_every != 0 and step != self.num_steps:
            return

        # 1) rates since the last line
        (positions,) = self.world.all_reduce(self.positions)
        seconds = time.monotonic() - self.start
        values["positions_per_second"] = positions / seconds
        values["waiting"] = (waited - self.waited) / seconds
        minutes = (self.num_steps - step) * seconds / (step - self.first) / 60
        self._start_line(step, waited)
        if self.world.rank != 0:
            return

        # 2) the share of the GPUs' peak (MFU), if that is known
        line = LINE.format(step=step, steps=self.num_steps, **values)
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
        for chip, peak in PEAK_FLOPS.items():
            if chip in gpu:
                values["mfu"] = self.flops_per_position * positions / seconds / (peak * self.world.size)
                line += f" MFU {values['mfu']:.0%}"
        print(f"{line} {minutes:.0f} min left", flush=True)
        self._write(step, values)

    def _start_line(self, step: int, waited: float):
        """From here on, count for the next line."""
        self.start, self.first = time.monotonic(), step
        self.positions, self.waited = 0, waited

    def scores(self, step: int, scores: dict[str, float]):
        """Every rank calls this after a validation."""
        if self.world.rank == 0:
            print(f"step {step} validation:", ", ".join(f"{name} {value:.4f}" for name, value in scores.items()))
            self._write(step, {f"validation {name}": value for name, value in scores.items()})

    def _write(self, step: int, values: dict[str, float]):
        with open(self.file, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step} | values) + "\n")
        for track in self.trackers:
            track(values, step)

    def plot_loss(self):
        """Draws loss.svg from log.jsonl."""
        entries = [json.loads(line) for line in self.file.read_text().splitlines()]
        lines = {"training": [], "validation": []}
        for entry in entries:
            if "loss" in entry:
                lines["training"].append((entry["step"], entry["loss"]))
            if "validation loss" in entry:
                lines["validation"].append((entry["step"], entry["validation loss"]))
        lines = {label: points for label, points in lines.items() if points}
        with atomic(self.out / "loss.svg") as file:
            file.write(curves("loss", "step", lines))


def open_tracker(name: str, out: Path, settings: dict):
    """Returns a tracker's function (values, step). Raises ValueError if its package is not installed."""
    try:
        if name == "wandb":
            import wandb

            return wandb.init(project="nanolibra", dir=out, config=settings).log
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError(f"report_to names {name}: pip install {name}") from None
    writer = SummaryWriter(str(out))

    def track(values: dict[str, float], step: int):
        for key, value in values.items():
            writer.add_scalar(key, value, step)

    return track


def curves(title: str, unit: str, lines: dict[str, list]) -> str:
    """Draws lines as an SVG picture with a logarithmic y axis. lines: label -> [(x, y), …]."""
    # 1) points (x, log y) -> pixels; the plot's corners are (60, 340) and (700, 40)
    lines = {label: np.array(line, dtype=float) for label, line in lines.items()}  # [N, 2]
    for line in lines.values():
        line[:, 1] = np.log(np.maximum(line[:, 1], 1e-9))
    points = np.concatenate(list(lines.values()))
    low = points.min(axis=0)
    span = np.maximum(points.max(axis=0) - low, 1e-9)
    to_pixels = lambda points: (60, 340) + (640, -300) * (points - low) / span

    # 2) five ticks on each axis
    parts = [text(60, 22, "start", title), text(700, 380, "end", unit)]
    for point in np.linspace(low, low + span, 5):
        x, log_y = point
        across, down = to_pixels(point)
        parts.append(f'<path d="M60 {down:.1f}H700" stroke="#8886"/>')
        parts.append(text(52, down + 4, "end", f"{math.exp(log_y):.3g}"))
        parts.append(text(across, 360, "middle", f"{x:,.0f}"))

    # 3) the lines, and their labels one below the other
    for number, (label, line) in enumerate(lines.items()):
        colour = COLOURS[number % len(COLOURS)]
        pixels = " ".join(f"{across:.1f},{down:.1f}" for across, down in to_pixels(line))
        parts.append(f'<polyline points="{pixels}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        parts.append(text(690, 60 + 18 * number, "end", label, colour))
    return "\n".join([SVG, *parts, "</svg>\n"])


def text(x, y, anchor: str, content: str, colour: str = "#888") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}"'
    return f"<text {place}>{html.escape(content)}</text>"
