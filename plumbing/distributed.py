"""The processes that torchrun started, or one alone: what they tell each other, and what they share out.

Numbers and texts go through gloo, so that they wait for no GPU; tensors on a GPU go through NCCL.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn


@dataclass(frozen=True)
class World:
    """This process among `count`."""

    rank: int = 0
    size: int = 1

    def local_device(self, device: torch.device) -> torch.device:
        """Of several processes on a machine with several GPUs each takes its own."""
        if self.size > 1 and device == torch.device("cuda"):
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
            torch.cuda.set_device(device)  # NCCL and FSDP ask for it
        return device

    def all_gather(self, value) -> list:
        """The values of all processes, by rank."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def barrier(self):
        """Wait until all processes are here."""
        self.all_gather(None)

    def all_reduce(self, *values) -> list[float]:
        """Of each number the sum over all processes."""
        return [sum(column) for column in zip(*self.all_gather(tuple(map(float, values))), strict=True)]

    def all_reduce_gradients(self, parameters: Iterable[nn.Parameter]):
        """Add the gradients of all processes, in buckets; those that took no part are 0. Sharded ones are summed."""
        if self.size == 1:
            return
        parameters = [parameter for parameter in parameters if not is_sharded(parameter)]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        bucket: list[torch.Tensor] = []
        for number, parameter in enumerate(parameters, 1):
            bucket.append(parameter.grad)
            if number == len(parameters) or sum(grad.numel() for grad in bucket) > 2**24:
                flat = torch.cat([grad.flatten() for grad in bucket])
                dist.all_reduce(flat)
                for grad, part in zip(bucket, flat.split([grad.numel() for grad in bucket]), strict=True):
                    grad.copy_(part.view_as(grad))
                bucket = []

    def clip_grad_norm(self, parameters: Iterable[nn.Parameter], limit: float) -> float:
        """Scale the gradients so that the norm of all of them is `limit` at most; the norm before."""
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        parts = [local_tensor(grad) for grad in grads if is_sharded(grad)]
        copies = [grad for grad in grads if not is_sharded(grad)]
        squares = [float(torch.nn.utils.get_total_norm(tensors)) ** 2 for tensors in (parts, copies)]
        norm = (self.all_reduce(squares[0])[0] + squares[1]) ** 0.5
        for grad in (parts + copies) * (norm > limit):
            grad.mul_(limit / norm)
        return norm


@contextmanager
def init_distributed() -> Iterator[World]:
    """This process among those that torchrun started; alone without it."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield World()
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=timedelta(days=30))  # the first to be done waits for the last
    try:
        yield World(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


# ------------------------------------------------------------------------------------------ sharded modules


def shard(module: nn.Module, blocks: Iterable[nn.Module], world: World):
    """Of the blocks of a module each process keeps a part: of parameters, gradients and optimizer state (FSDP2).

    A block is put together where it is computed, in 16 bits on a GPU, and what lies outside the blocks stays a copy in
    each process. Gradients are summed, not averaged. Blocks must be computed equally often in all processes, save
    inside `together`.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    kind = next(module.parameters()).device.type
    # what goes in keeps its type, as under autocast, which rounds the same weights at the same places
    half = MixedPrecisionPolicy(torch.bfloat16 if kind == "cuda" else None, torch.float32, cast_forward_inputs=False)
    mesh = init_device_mesh(kind, (world.size,))
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=half)
        block.set_gradient_divide_factor(1.0)
        block.set_force_sum_reduction_for_comms(True)
    fully_shard(module, mesh=mesh, ignored_params=set(module.parameters()))  # what runs the blocks ahead of each other


@contextmanager
def unsharded(module: nn.Module):
    """In here each process has all of a module, and may compute as often as it likes."""
    blocks = [block for block in module.modules() if hasattr(block, "unshard")]
    for block in blocks:
        block.set_reshard_after_forward(False, recurse=False)
        block.unshard()
    yield
    for block in blocks:
        block.reshard()
        block.set_reshard_after_forward(True, recurse=False)


def is_sharded(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, "placements")


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a sharded tensor."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def full_tensor(tensor: torch.Tensor, keep: bool) -> torch.Tensor | None:
    """A tensor; of a sharded one all, in host memory: all processes must ask, who does not keep it gets None."""
    if not is_sharded(tensor):
        return tensor
    full = tensor.full_tensor()
    return full.cpu() if keep else None


def copy_full(tensor: torch.Tensor, full: torch.Tensor) -> torch.Tensor:
    """Copy all of a tensor into one that may be sharded, which is returned."""
    if is_sharded(tensor):
        from torch.distributed.tensor import distribute_tensor

        full = full.to(tensor.device)
        full = distribute_tensor(full, tensor.device_mesh, tensor.placements, src_data_rank=None)  # all have it
    return tensor.copy_(full)
