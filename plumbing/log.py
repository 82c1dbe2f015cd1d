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

# part of a GPU's name -> dense TFLOP/s in bfloat16, from the makers' data sheets
PEAK_TFLOPS = {
    "A100": 312, "H100": 989, "H200": 989, "B200": 2250, "L40S": 362, "A6000": 155,
    "3090": 71, "4090": 165, "5090": 210, "MI300X": 1307,
}  # fmt: skip
TRACKERS = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}  # -> its Python module
LINE = "step {step}/{steps} loss {loss:.4f} lr {lr:.2e} norm {norm:.3f} "
LINE += "{positions_per_second:,.0f} positions/s waiting {waiting:.0%}"
# the lines of loss.svg
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
        self.start = time.monotonic()
        self.positions, self.waited = 0, 0.0
        if self.world.rank != 0:
            return

        # steps behind the checkpoint will be logged again, and a full disk may have torn the last line
        self.out.mkdir(parents=True, exist_ok=True)
        self.file.touch()
        old = read_log(self.file) if self.first_step else []
        with atomic(self.file) as file:
            for entry in old:
                if entry["step"] <= self.first_step:
                    print(json.dumps(entry), file=file)
        # every setting, defaults included
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
        seconds_left = (self.num_steps - step) * seconds / (step - self.first_step)
        self.start += seconds
        self.positions = 0
        self.waited, self.first_step = waited, step
        if self.world.rank != 0:
            return

        # 2) the share of the GPUs' peak that was used (MFU), if the peak is known
        line = LINE.format(step=step, steps=self.num_steps, **values)
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
        flops = self.flops_per_position * values["positions_per_second"] / self.world.size
        for chip, peak in PEAK_TFLOPS.items():
            if chip in gpu:
                values["mfu"] = flops / 1e12 / peak
                line += f" MFU {values['mfu']:.0%}"
        print(f"{line} {seconds_left / 60:.0f} min left", flush=True)
        self._write(step, values)

    def scores(self, step: int, scores: dict):
        """Call this after a validation."""
        if self.world.rank == 0:
            texts = [f"{name} {value:.4f}" for name, value in scores.items()]
            print(f"step {step} validation:", ", ".join(texts))
            self._write(step, {f"validation {name}": value for name, value in scores.items()})

    def _write(self, step: int, values: dict):
        with open(self.file, "a", encoding="utf-8") as file:
            print(json.dumps({"step": step} | values), file=file)
        for track in self.trackers:
            track(values, step)

    def plot_loss(self):
        """Draws loss.svg from log.jsonl."""
        lines = {}
        for entry in read_log(self.file):
            label = "training" if "loss" in entry else "validation"
            loss = entry.get("loss", entry.get("validation loss"))
            if isinstance(loss, float):
                lines.setdefault(label, []).append((entry["step"], loss))
        with atomic(self.out / "loss.svg") as file:
            file.write(curves("loss", "step", lines))


def read_log(path: Path) -> list[dict]:
    """The entries of log.jsonl; a line that is torn, or none of ours, is left out."""
    entries = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict) and type(entry.get("step")) is int:
            entries.append(entry)
    return entries


def open_tracker(name: str, config):
    """Returns a tracker's function (values, step). Raises ValueError if its package is not installed."""
    try:
        module = importlib.import_module(TRACKERS[name])
    except ImportError:
        raise ValueError(f"report_to names {name}: pip install {name}") from None
    if name == "wandb":
        return module.init(project="nanolibra", dir=config.out_dir, config=asdict(config)).log
    writer = module.SummaryWriter(config.out_dir)
    return lambda values, step: [writer.add_scalar(*item, step) for item in values.items()]


def curves(title: str, unit: str, lines: dict[str, list]) -> str:
    """Draws lines as an SVG picture with a logarithmic y axis. lines: label -> [(x, y), …]."""
    # 1) the range of the points (x, log y)
    logs = [np.array(line, dtype=float) for line in lines.values()]
    for line in logs:
        line[:, 1] = np.log(line[:, 1].clip(1e-9))
    points = np.concatenate(logs)  # [all points, 2]
    low, high = points.min(axis=0), points.max(axis=0)
    svg = axes(title, unit, low, high)

    # 2) the lines, whose corners are (60, 340) and (700, 40), and their labels one below the other
    for number, label in enumerate(lines):
        colour = COLOURS[number % len(COLOURS)]
        shares = (logs[number] - low) / np.maximum(high - low, 1e-9)
        pixels = " ".join(f"{60 + 640 * x:.1f},{340 - 300 * y:.1f}" for x, y in shares)
        svg += f'<polyline points="{pixels}" fill="none" stroke="{colour}" stroke-width="1.5"/>\n'
        svg += f'<text x="690" y="{60 + 18 * number}" text-anchor="end" fill="{colour}">{label}</text>\n'
    return svg + "</svg>\n"


def axes(title: str, unit: str, low, high) -> str:
    """The picture's head: what its axes show, and five ticks on each. low and high are (x, log y)."""
    svg = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 390" style="font: 13px sans-serif" fill="#888">\n'
    svg += f'<text x="60" y="22">{title}</text><text x="700" y="380" text-anchor="end">{unit}</text>\n'
    for tick, (x, log) in enumerate(np.linspace(low, high, 5)):
        right, down = 60 + 160 * tick, 340 - 75 * tick
        svg += f'<path d="M60 {down}H700" stroke="#8886"/>\n'
        svg += f'<text x="52" y="{down + 4}" text-anchor="end">{math.exp(log):.3g}</text>\n'
        svg += f'<text x="{right}" y="360" text-anchor="middle">{x:,.0f}</text>\n'
    return svg
