"""Saves the state of a training run, and loads it to resume the run.

A checkpoint holds whole tensors by name, so that a run can be resumed with any number of ranks, sharded or not.
"""

import sys
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from torch.distributed.checkpoint import state_dict as states

from plumbing.distributed import World
from plumbing.files import atomic

# Everything that learns, by name: rank 0 receives whole tensors in host memory, the other ranks nothing.
GATHER = states.StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
# The way back: every rank has the whole tensors and takes its part. Frozen parameters stay as they are.
SCATTER = states.StateDictOptions(full_state_dict=True, strict=False)
LEARNING = states.StateDictOptions(ignore_frozen_params=True)


def checkpoint_files(out_dir) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted(Path(out_dir, "checkpoints").glob("step-*.pt"))


@dataclass
class Checkpoints:
    """out_dir/checkpoints/step-N.pt. `config` is a run's dataclass with `out_dir` and `keep`, the number of files."""

    config: object  # every field has a default
    may_change: tuple[str, ...]  # fields of the config in which a resumed run may differ
    model: nn.Module
    optimizer: torch.optim.Optimizer
    world: World
    checksums: dict[str, int]  # of what a resumed run must find as it was, such as the records

    def save(self, step: int, best: float):
        """Saves the state after `step` steps, then deletes old checkpoints. Every rank must call this."""
        state = {"config": asdict(self.config), "checksum_of": self.checksums, "step": step, "best": best}
        state["weights"] = states.get_model_state_dict(self.model, options=GATHER)
        state["optimizer"] = states.get_optimizer_state_dict(self.model, self.optimizer, options=GATHER)
        # all ranks gather, one writes
        if self.world.rank != 0:
            return
        file = Path(self.config.out_dir, "checkpoints", f"step-{step:07}.pt")
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with atomic(file, "wb") as stream:
                torch.save(state, stream)
        except RuntimeError as error:  # torch's writer has an error of its own for a full disk
            raise OSError(f"{file} could not be written ({error}): is the disk full?") from None
        self._remove_old()

    def _remove_old(self):
        """Removes all checkpoints but the newest, and what a killed process left of one."""
        old = checkpoint_files(self.config.out_dir)[: -self.config.keep]
        torn = Path(self.config.out_dir, "checkpoints").glob(".step-*.pt.partial")
        for file in [*old, *torn]:
            file.unlink()

    def load(self) -> tuple[int, float]:
        """Loads the newest checkpoint that is not damaged. Returns (steps done, best score).

        Raises ValueError if there is none, or if it belongs to a run with other settings, records or frozen weights.
        """
        file, state = self._newest()
        if self.world.rank == 0:
            # a process may have been killed between saving and this
            self._remove_old()
        # 1) refuse another run's checkpoint; a setting that is newer than the file had its default
        before = asdict(type(self.config)()) | state["config"]
        for name, value in asdict(self.config).items():
            if before[name] != value and name not in self.may_change:
                raise ValueError(f"{file} was made with {name}={before[name]!r}, not {value!r}: use another out_dir")
        for name, value in state.get("checksum_of", {}).items():  # older checkpoints have none
            if value != self.checksums[name]:
                raise ValueError(f"the {name} have changed since {file} was made: restore them, or use another out_dir")
        ours = states.get_model_state_dict(self.model, options=LEARNING)
        if list_shapes(ours) != list_shapes(state["weights"]):
            raise ValueError(f"{file} holds other weights than this config trains: use another out_dir")

        # 2) fill the optimizer, whose groups depend on sharding, and then the weights
        groups = states.get_optimizer_state_dict(self.model, self.optimizer)["param_groups"]
        moments = dict(state=state["optimizer"]["state"], param_groups=groups)
        states.set_optimizer_state_dict(self.model, self.optimizer, moments, options=SCATTER)
        states.set_model_state_dict(self.model, state["weights"], options=SCATTER)
        return state["step"], state["best"]

    def _newest(self) -> tuple[Path, dict]:
        for file in reversed(checkpoint_files(self.config.out_dir)):
            try:
                # the file has a checksum for each tensor, which torch does not look at
                if zipfile.ZipFile(file).testzip():
                    raise ValueError("a checksum is wrong")
                # mapped, because every rank reads the file: of tens of GB each rank takes its own part
                state = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
                if {"config", "step", "best", "weights", "optimizer"} <= state.keys():
                    return file, state
            except Exception:  # damage shows in many ways
                pass
            print(f"{file} is damaged or no checkpoint: trying the one before", file=sys.stderr)
        raise ValueError(f"{self.config.out_dir} holds no checkpoint to continue from: run without --resume")


def list_shapes(tensors: dict) -> dict:
    return {name: tensor.shape for name, tensor in tensors.items()}
