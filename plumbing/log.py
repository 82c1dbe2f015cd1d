"""The log of a training run: clean lines on stdout, log.jsonl, a picture of the loss, other trackers where asked."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bench.costs import GPUS
from evaluation import page as report
from plumbing.cli import atomic
from plumbing.distributed import World


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
        self.peak = next((flops for chip, (flops, *_) in GPUS.items() if chip in name), None)
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
            file.write(report.curves("loss", "step", {name: points for name, points in found.items() if points}))


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
