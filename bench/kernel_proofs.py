"""Compile the kernels for GPUs that are not here, and check that the machine code can be fast.

    python -m bench.kernel_proofs            every target, size and type: some ten minutes on one core
    python -m bench.kernel_proofs --quick    bfloat16, head sizes 64 and 128, 1 and 64 rows of int8, sm_80 and sm_90

It calls the functions that launch kernels, with a driver for Triton that names a GPU and launches nothing. So it
compiles what that GPU would run: the same block sizes, the same alignment of pointers and strides. Each kernel must use
tensor cores, load 16 bytes at a time, fit into shared memory, and keep everything in registers.
"""

import argparse
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import kernel
from plumbing.int8_kernel import int8_linear


class Target(NamedTuple):
    gpu: GPUTarget
    kind: str  # row of kernel.TILES
    shared: int  # bytes of shared memory that a program may use


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), "ampere", 99 * 1024),  # 163 KB, but sm_86, sm_89 and sm_120 have less
    "sm_90": Target(GPUTarget("cuda", 90, 32), "hopper", 227 * 1024),
    "sm_100": Target(GPUTarget("cuda", 100, 32), "hopper", 227 * 1024),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), "amd", 64 * 1024),
}
SIZES = (16, 24, 64, 72, 80, 96, 128, 256)  # of heads
ROWS = (1, 64)  # of an int8 layer's input, one number for each tile
TYPES = (torch.bfloat16, torch.float16, torch.float32)
TENSOR_CORES = r"wgmma\.mma_async|tcgen05\.mma|mma\.sync|v_mfma_\w+"
WIDE_LOADS = r"ld\.global[\w.:]*\.v4\.b32|cp\.async\.cg|load_dwordx4"
# Bytes that a thread may spill from registers to memory. In float32 a head of 256 is too much at any block size: it
# works, slowly. In 16 bits dK and dV on sm_90 spill one number; smaller blocks would spill none, but not fit wgmma.
ACCEPTED = {(torch.float32, 256): 1000, (torch.bfloat16, 256): 8, (torch.float16, 256): 8}


def nvidia_spills(ptx: str) -> int:
    """Assemble a kernel once more with the assembler that comes with Triton, which reports what it spills."""
    arch = re.search(r"\.target (\w+)", ptx).group(1)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    assembler = tools / ("ptxas-blackwell" if "sm_1" in arch else "ptxas")
    command = [assembler, "-v", f"-arch={arch}", "-o", os.devnull, "-"]
    done = subprocess.run(command, input=ptx, check=True, capture_output=True, text=True)
    return sum(map(int, re.findall(r"(\d+) bytes spill", done.stderr)))


def spilled_bytes(compiled) -> int:
    """Bytes per thread."""
    if "ptx" in compiled.asm:
        return nvidia_spills(compiled.asm["ptx"])
    # scalar registers are spilled to vector registers, which touches no memory: only the latter count
    return 4 * int(re.search(r"\.vgpr_spill_count:\s+(\d+)", compiled.asm["amdgcn"]).group(1))


class AbsentGPU:
    """A driver of Triton for a GPU that is not here."""

    def __init__(self, gpu):
        self.get_current_target = lambda: gpu
        self.get_current_device = lambda: str(gpu)  # Triton keeps compiled kernels by device
        self.get_current_stream = lambda device: None


def run_attention(D: int, dtype):
    """Attention forward and backward over one row, laid out as the projections of a layer leave it.

    New segments mean a new mask, so that the kernel that lists visits is compiled each time.
    """
    q, k, v = (torch.empty(1, 256, 1, D, dtype=dtype).transpose(1, 2).requires_grad_() for _ in range(3))
    segments = torch.zeros(1, 256, dtype=torch.long)
    out = kernel.fused_attention(q, k, v, causal=True, segments=segments, window=None, positions=None)
    out.backward(torch.empty_like(out))


def run_int8(rows: int, dtype):
    weight = torch.empty(64, 512, dtype=torch.int8)
    int8_linear(torch.empty(rows, 512, dtype=dtype), weight, torch.empty(64))


def compile_kernels(target: Target, work, size: int, dtype) -> list:
    """Runs `work` without launching anything; returns [(kernel name, compiled kernel), …]."""
    kernels = []
    launch = JITFunction.run

    def compile_only(function, *arguments, grid, warmup, **options):
        name = function.__name__.strip("_").removesuffix("_kernel")
        kernels.append((name, launch(function, *arguments, grid=grid, warmup=True, **options)))

    # let Triton and the tables of block sizes believe in the GPU
    driver.set_active(AbsentGPU(target.gpu))
    kernel.gpu_kind = lambda device: target.kind
    JITFunction.run = compile_only
    try:
        work(size, dtype)
    finally:
        JITFunction.run = launch
    return kernels


def prove(targets, sizes, rows, types) -> list[str]:
    """Prints which tensor core instructions every kernel uses; returns what is wrong, one line each."""
    problems = []
    works = [(run_attention, D) for D in sizes] + [(run_int8, count) for count in rows]
    for name, dtype, (work, size) in itertools.product(targets, types, works):
        target = TARGETS[name]
        for kernel_name, compiled in compile_kernels(target, work, size, dtype):
            code = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
            instructions = set(re.findall(TENSOR_CORES, code))
            label = f"{name} {str(dtype)[6:]} {size} {kernel_name}"
            print(f"{label:30}", *sorted(instructions), flush=True)
            # the kernel that lists visits computes no products and loads few numbers
            multiplies = kernel_name != "visits"
            faults = {
                "spills": spilled_bytes(compiled) > ACCEPTED.get((dtype, size), 0),
                "too much shared memory": compiled.metadata.shared > target.shared,
                "no tensor cores": multiplies and not instructions,
                "narrow loads": multiplies and not re.search(WIDE_LOADS, code),
            }
            problems += [f"{label}: {fault}" for fault, is_true in faults.items() if is_true]
    return problems


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="bfloat16, few sizes, sm_80 and sm_90")
    if parser.parse_args().quick:
        problems = prove(("sm_80", "sm_90"), (64, 128), ROWS, (torch.bfloat16,))
    else:
        problems = prove(TARGETS, SIZES, ROWS, TYPES)
    sys.exit("\n".join(problems) or 0)


if __name__ == "__main__":
    main()
