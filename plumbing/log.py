"""The log of a training run: clean lines on stdout, log.jsonl, a picture of the loss, other trackers where asked."""

import html
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch

from plumbing.distributed import World
from plumbing.files import atomic

PEAK_FLOPS = {  # name of a GPU -> dense FLOP/s in bfloat16, from the makers' data sheets
    "A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "L40S": 362e12, "A6000": 155e12,
    "3090": 71e12, "4090": 165e12, "5090": 210e12, "MI300X": 1307e12,
}  # fmt: skip


class Log:
    """settings: of the run, run.json. work: FLOP of a position. first: the step that a resumed run goes on from."""

    def __init__(
        self, out, settings: dict, trackers: tuple[str, ...], every: int, first: int, steps: int, work: int,
        world: World,
    ):  # fmt: skip
        self.out, self.world, self.every, self.steps, self.work = Path(out), world, every, steps, work
        self.file, self.trackers = self.out / "log.jsonl", []
        if world.rank == 0:
            self.out.mkdir(parents=True, exist_ok=True)
            lines = self.file.read_text().splitlines() if self.file.exists() and first else []
            lines = [line for line in lines if line.endswith("}")]  # a full disk may have torn the last
            with atomic(self.file) as file:  # what a killed run logged behind its checkpoint comes again
                file.writelines(f"{line}\n" for line in lines if json.loads(line)["step"] <= first)
            with atomic(self.out / "run.json") as file:
                json.dump(settings, file, indent=1)
            self.trackers = [TRACKERS[name](self.out, settings) for name in trackers]
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
        self.peak = next((flops for chip, flops in PEAK_FLOPS.items() if chip in name), None)
        self.last, self.done, self.positions, self.waited = time.monotonic(), first, 0, 0.0

    def step(self, done: int, values: dict[str, float], positions: int, waited: float):
        """After a step; positions: what this process computed in it; waited: seconds for data since the beginning."""
        self.positions += positions
        if done % self.every and done != self.steps:
            return
        (positions,) = self.world.all_reduce(self.positions)
        seconds, steps = time.monotonic() - self.last, done - self.done
        rate, waiting = positions / seconds, (waited - self.waited) / seconds
        self.last, self.done, self.positions, self.waited = time.monotonic(), done, 0, waited
        if self.world.rank:
            return
        shown = f"step {done}/{self.steps} loss {values['loss']:.4f} lr {values['lr']:.2e} norm {values['norm']:.3f}"
        shown += f" {rate:,.0f} positions/s waiting {waiting:.0%}"
        values = values | {"positions_per_second": rate, "waiting": waiting}
        if self.peak:
            values["mfu"] = self.work * rate / self.peak / self.world.size
            shown += f" MFU {values['mfu']:.0%}"
        print(f"{shown} {(self.steps - done) * seconds / steps / 60:.0f} min left", flush=True)
        self._write(done, values)

    def scores(self, done: int, scores: dict[str, float]):
        """After a validation."""
        if self.world.rank == 0:
            print(f"step {done} validation: " + ", ".join(f"{name} {value:.4f}" for name, value in scores.items()))
            self._write(done, {f"validation {name}": value for name, value in scores.items()})

    def _write(self, done: int, values: dict[str, float]):
        with open(self.file, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": done} | values) + "\n")
        for track in self.trackers:
            track(values, done)

    def plot_loss(self):
        """loss.svg."""
        lines = [json.loads(line) for line in self.file.read_text().splitlines()]
        names = {"loss": "training", "validation loss": "validation"}
        found = {shown: [(line["step"], line[name]) for line in lines if name in line] for name, shown in names.items()}
        with atomic(self.out / "loss.svg") as file:
            file.write(curves("loss", "step", {name: points for name, points in found.items() if points}))


Track = Callable[[dict[str, float], int], None]  # values of a step


def _tensorboard(out: Path, settings: dict) -> Track:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("report_to names tensorboard: pip install tensorboard") from None
    writer = SummaryWriter(str(out))
    return lambda values, step: [writer.add_scalar(name, value, step) for name, value in values.items()]


def _wandb(out: Path, settings: dict) -> Track:
    try:
        import wandb
    except ImportError:
        raise ValueError("report_to names wandb: pip install wandb") from None
    started = wandb.init(project="nanolibra", dir=out, config=settings)
    return lambda values, step: started.log(values, step=step)


TRACKERS = {"tensorboard": _tensorboard, "wandb": _wandb}


# ------------------------------------------------------------------------------------------ the picture

COLOURS = ("#0b7285", "#e8590c", "#5f3dc4", "#2b8a3e")


def curves(title: str, unit: str, lines: dict[str, list[tuple[float, float]]]) -> str:
    """Lines by their names, each a list of points (x, y), as an SVG picture; y on a logarithmic axis."""
    points = [point for line in lines.values() for point in line]
    (left, right), (low, high) = ((min(values), max(values)) for values in zip(*points, strict=True))
    low, high = math.log(max(low, 1e-9)), math.log(max(high, 2e-9))
    place = lambda x, y: (
        60 + 640 * (x - left) / max(right - left, 1e-9),
        340 - 300 * (math.log(max(y, 1e-9)) - low) / max(high - low, 1e-9),
    )
    drawn = []
    for tick in range(5):
        value = math.exp(low + (high - low) * tick / 4)
        y = place(left, value)[1]
        drawn.append(f'<path d="M60 {y:.1f}H700" stroke="#8886"/>')
        drawn.append(f'<text x="52" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    for tick in range(5):
        value = left + (right - left) * tick / 4
        drawn.append(f'<text x="{place(value, 1)[0]:.1f}" y="360" text-anchor="middle">{value:,.0f}</text>')
    for number, (name, line) in enumerate(lines.items()):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in line))
        colour = COLOURS[number % len(COLOURS)]
        drawn.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        label = f'<text x="690" y="{60 + 18 * number}" text-anchor="end" fill="{colour}">'
        drawn.append(f"{label}{html.escape(name)}</text>")
    drawn.append(f'<text x="60" y="22">{html.escape(title)}</text>')
    drawn.append(f'<text x="700" y="380" text-anchor="end">{html.escape(unit)}</text>')
    look = 'font-family="sans-serif" font-size="13" fill="#888"'
    return "\n".join((f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 390" {look}>', *drawn, "</svg>\n"))
