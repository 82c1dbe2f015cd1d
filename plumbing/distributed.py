"""The processes that torchrun started, or one process alone: what they exchange, and how they share a large model."""

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
    """This process, number `rank` of `size`. Alone it is number 0 of 1, and every method works without torchrun."""

    rank: int = 0
    size: int = 1

    def local_device(self, device: torch.device) -> torch.device:
        """The GPU of this rank, if there are several ranks and `device` is cuda without a number."""
        if self.size > 1 and device == torch.device("cuda"):
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
            torch.cuda.set_device(device)  # NCCL and FSDP use the current one
        return device

    def all_gather(self, value) -> list:
        """The values of all ranks, in order of rank."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def barrier(self):
        """Waits for all ranks."""
        self.all_gather(None)

    def all_reduce(self, *values) -> list[float]:
        """Sums each number over all ranks."""
        rows = self.all_gather([float(value) for value in values])
        return [sum(column) for column in zip(*rows, strict=True)]

    def all_reduce_gradients(self, parameters: Iterable[nn.Parameter]):
        """Sums the gradients of all ranks. FSDP has summed those of sharded parameters in the backward pass."""
        parameters = [parameter for parameter in parameters if not is_sharded(parameter)]
        # a parameter that took no part on this rank counts as 0, also if there is no other rank
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.size == 1:
            return
        # in buckets of some 16 million numbers: a message per tensor would take ten times as long
        buckets = [[]]
        for parameter in parameters:
            if sum(grad.numel() for grad in buckets[-1]) > 2**24:
                buckets.append([])
            buckets[-1].append(parameter.grad)
        for grads in buckets:
            flat = nn.utils.parameters_to_vector(grads)
            dist.all_reduce(flat)
            nn.utils.vector_to_parameters(flat, grads)

    def clip_grad_norm(self, parameters: Iterable[nn.Parameter], limit: float) -> float:
        """Scales all gradients so that their norm is at most `limit`. Returns the norm they had."""
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        shards = [grad.to_local() for grad in grads if is_sharded(grad)]
        copies = [grad for grad in grads if not is_sharded(grad)]
        # each rank has its own shards, and the same copies as the others
        (squared,) = self.all_reduce(float(nn.utils.get_total_norm(shards)) ** 2)
        norm = (squared + float(nn.utils.get_total_norm(copies)) ** 2) ** 0.5
        if norm > limit:
            for grad in shards + copies:
                grad.mul_(limit / norm)
        return norm


@contextmanager
def init_distributed() -> Iterator[World]:
    """Joins the other processes of torchrun, if it started this one."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield World()
        return
    # numbers and objects go through gloo, which does not wait for a GPU; tensors on a GPU go through NCCL
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    # the first rank to finish waits for the last, however long that takes
    dist.init_process_group(backend, timeout=timedelta(days=30))
    try:
        yield World(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether this rank has only a part of the tensor (a DTensor)."""
    return hasattr(tensor, "placements")


def shard(module: nn.Module, blocks: Iterable[nn.Module], world: World):
    """Splits the blocks of a module over all ranks: parameters, gradients and optimizer state (FSDP2).

    A block is gathered while it is computed, on a GPU in bfloat16; what is outside the blocks stays a copy. Gradients
    are summed, not averaged. All ranks must compute a block equally often, except inside `unsharded`.
    """
    from torch.distributed.device_mesh import init_device_mesh  # slow to import, and needed by few runs
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    device = next(module.parameters()).device.type
    mesh = init_device_mesh(device, (world.size,))
    # inputs keep their type, as under autocast, so that weights are rounded in the same places
    parameters = torch.bfloat16 if device == "cuda" else None
    policy = MixedPrecisionPolicy(parameters, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
        block.set_gradient_divide_factor(1.0)
        block.set_force_sum_reduction_for_comms(True)
    # shards nothing, but gathers the next block while one is computed
    fully_shard(module, mesh=mesh, ignored_params=set(module.parameters()))


@contextmanager
def unsharded(module: nn.Module):
    """Inside, each rank has the whole module and may compute it as often as it likes."""
    blocks = [block for block in module.modules() if hasattr(block, "unshard")]
    for block in blocks:
        block.set_reshard_after_forward(False, recurse=False)
        block.unshard()
    yield
    for block in blocks:
        block.reshard()
        block.set_reshard_after_forward(True, recurse=False)
