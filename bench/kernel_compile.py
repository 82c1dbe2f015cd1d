"""Compiles the kernels for GPUs that are not here, and reads in what comes out whether they can be fast.

    python -m bench.kernel_compile            every target, head size and type: some ten minutes on one core
    python -m bench.kernel_compile --quick    bfloat16 at head sizes 64 and 128 for sm_80 and sm_90

It calls `attention` itself, with Triton's driver replaced by one that knows a target and launches nothing: what is
compiled is what a GPU would run, with the same block sizes and the same divisibility of pointers and strides. Each
kernel must use tensor cores, load 16 bytes at a time, fit the shared memory and keep everything in registers;
`cuobjdump` and `ptxas` come with Triton. Last, a roofline of a layer of the 7B model, computed from these facts.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import attention
import kernel as fused

KB = 1024
TARGETS = {  # name -> (Triton's name, row of the table, shared memory of a program)
    "sm_80": (GPUTarget("cuda", 80, 32), "ampere", 99 * KB),  # 163 KB, but the row also serves sm_86, sm_89 and sm_120
    "sm_90": (GPUTarget("cuda", 90, 32), "hopper", 227 * KB),
    "sm_100": (GPUTarget("cuda", 100, 32), "hopper", 227 * KB),
    "gfx942": (GPUTarget("hip", "gfx942", 64), "amd", 64 * KB),
}
SIZES = (16, 24, 64, 72, 80, 96, 128, 256)
TYPES = (torch.bfloat16, torch.float16, torch.float32)
TENSOR_CORES = r"wgmma\.mma_async|tcgen05\.mma|mma\.sync|v_mfma_\w+"
# Bytes that a thread may write to memory and read back, all together. In float32, rows of 1 KB are too much for the
# registers at any block size, and nobody trains heads of 256 in it on a GPU: it works, slowly. In 16 bits, dK and dV on
# sm_90 spill one number; the block sizes that spill none are too small for wgmma.
ACCEPTED = {(torch.float32, 256): 1000, (torch.bfloat16, 256): 8, (torch.float16, 256): 8}
BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass
class Facts:
    registers: int  # of a thread
    spilled: int  # bytes of a thread that went to memory
    shared: int  # bytes of a program
    warps: int
    instructions: set[str]  # of the tensor cores
    wide: bool  # loads of 16 bytes


def facts(kernel) -> Facts:
    """What the compiler made of a kernel."""
    shared, warps = kernel.metadata.shared, kernel.metadata.num_warps
    if "amdgcn" in kernel.asm:
        text = kernel.asm["amdgcn"]
        field = lambda name: int(re.search(rf"\.{name}:\s+(\d+)", text).group(1))
        # scalar registers are spilled to lanes of vector registers: no memory is touched, nothing to count
        return Facts(field("vgpr_count"), 4 * field("vgpr_spill_count"), shared, warps,
                     set(re.findall(TENSOR_CORES, text)), "load_dwordx4" in text)  # fmt: skip
    text = kernel.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder, "kernel.cubin"), Path(folder, "kernel.ptx")
        cubin.write_bytes(kernel.asm["cubin"])
        usage = output("cuobjdump", "--dump-resource-usage", cubin)
        registers, stack = (int(re.findall(rf"{name}:(\d+)", usage)[-1]) for name in ("REG", "STACK"))
        spilled = 0
        if stack:  # arrays may live there too: ask the assembler what was spilled
            ptx.write_text(text)
            arch = re.search(r"\.target (\w+)", text).group(1)
            assembler = "ptxas-blackwell" if "sm_1" in arch else "ptxas"
            said = output(assembler, "-v", f"-arch={arch}", ptx, "-o", Path(folder, "out"))
            spilled = sum(map(int, re.findall(r"(\d+) bytes spill", said)))
    wide = bool(re.search(r"ld\.global[\w.:]*\.v4\.b32|cp\.async\.cg", text))
    return Facts(registers, spilled, shared, warps, set(re.findall(TENSOR_CORES, text)), wide)


def output(program, *arguments) -> str:
    done = subprocess.run([BINARIES / program, *arguments], check=True, capture_output=True, text=True)
    return done.stdout + done.stderr


class Elsewhere:
    """A driver of Triton's for a GPU that is not there."""

    def __init__(self, target):
        self.target = target
        self.get_current_target = lambda: target
        self.get_current_device = lambda: str(target)  # compiled kernels are kept by device
        self.get_current_stream = lambda device: None


def compiled(name: str, D: int, dtype, segments=None, H=1) -> list:
    """(name of a kernel, what it is compiled to): all of attention over one row, forward and backward."""
    target, row, _ = TARGETS[name]
    driver.set_active(Elsewhere(target))
    fused._target = lambda device: row
    fused._visits.cache_clear()
    found = []

    def run(kernel, *arguments, grid, warmup, **options):
        made = launch(kernel, *arguments, grid=grid, warmup=True, **options)
        found.append((kernel.__name__.removesuffix("_kernel").strip("_"), made))

    launch, JITFunction.run = JITFunction.run, run
    try:
        segments = torch.zeros(1, 256, dtype=torch.long) if segments is None else segments
        q, k, v = (torch.empty(1, segments.shape[1], H, D, dtype=dtype).transpose(1, 2).requires_grad_() for _ in "qkv")
        out = fused.fused_attention(q, k, v, True, segments, None, None)
        out.backward(torch.empty_like(out))
    finally:
        JITFunction.run = launch
    return found


def prove(targets, sizes, types) -> list[str]:
    """Print the facts of every kernel; what is wrong with some."""
    wrong = []
    print(f"{'target':7}{'type':>9}{'D':>4}  {'kernel':8}{'registers':>9}{'spilled':>8}{'shared':>8}  tensor cores")
    for name in targets:
        limit = TARGETS[name][2]
        for dtype in types:
            for D in sizes:
                for kernel, made in compiled(name, D, dtype):
                    found = facts(made)
                    label = f"{name:7}{str(dtype)[6:]:>9}{D:4}  {kernel:8}"
                    print(f"{label}{found.registers:9}{found.spilled:8}{found.shared:8}  "
                          + " ".join(sorted(found.instructions)), flush=True)  # fmt: skip
                    faults = {"spills": found.spilled > ACCEPTED.get((dtype, D), 0),
                              "too much shared memory": found.shared > limit,
                              "no tensor cores": kernel != "visits" and not found.instructions,
                              "narrow loads": kernel != "visits" and not found.wide}  # fmt: skip
                    wrong += [f"{' '.join(label.split())}: {fault}" for fault, there in faults.items() if there]
    return wrong


# ------------------------------------------------------------------------------------------ roofline

# data sheets, dense bfloat16: target, FLOP of an SM's tensor cores in a cycle, SMs, GHz, bytes/s, shared memory
GPUS = {
    "A100": ("sm_80", 2048, 108, 1.41, 2.04e12, 164 * KB),
    "H100": ("sm_90", 4096, 132, 1.83, 3.35e12, 228 * KB),
}
DOTS = {"forward": 2, "dq": 3, "dkdv": 4}  # products of a pair of blocks
TENSORS = {"forward": 4, "dq": 6, "dkdv": 6}  # [H, T, D] that are read or written
SIMPLE = {"forward": 5, "dq": 4, "dkdv": 4}  # instructions on a score beside the exponential


def roofline():
    """A Markdown table of a layer of the 7B model (32 heads of 128) over a row of four questions behind one prefix."""
    segments = torch.tensor([[0] * 1404 + [1] * 90 + [2] * 45 + [3] * 130 + [4] * 75])
    T, H, D = segments.shape[1], 32, 128
    seen = attention._visible(segments, T, T)[0, 0]
    print("| GPU | kernel | GFLOP | MB | FLOP / byte | registers | shared KB | warps on an SM, of 64 | of peak | ms |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for gpu, (name, speed, units, clock, bandwidth, memory) in GPUS.items():
        for kernel, made in compiled(name, D, torch.bfloat16, segments, H):
            if kernel == "visits":
                continue
            found = facts(made)
            own, visited, options = fused._tile(torch.empty(0, D, dtype=torch.bfloat16), kernel != "forward")
            M, N = (visited, own) if kernel == "dkdv" else (own, visited)
            blocks = sum(bool(block.any()) for rows in seen.split(M) for block in rows.split(N, 1))
            pairs = H * blocks * M * N
            flop, moved = 2 * DOTS[kernel] * pairs * options["WIDTH"], TENSORS[kernel] * H * T * D * 2
            programs = min(65536 // (-(-found.registers // 8) * 8 * 32 * found.warps), memory // (found.shared + KB))
            # cycles of a score on its SM: products; 16 exponentials and 128 simple instructions at once
            products = 2 * DOTS[kernel] * options["WIDTH"] / speed
            share = products / (products + 1 / 16 + SIMPLE[kernel] / 128)
            seconds = max(flop / (speed * units * clock * 1e9 * share), moved / bandwidth)
            print(f"| {gpu} | {kernel} | {flop / 1e9:.1f} | {moved / 1e6:.0f} | {flop / moved:.0f} |", found.registers,
                  f"| {found.shared / KB:.0f} | {programs * found.warps} | {share:.0%} | {1e3 * seconds:.2f} |",
            )  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="bfloat16, head sizes 64 and 128, sm_80 and sm_90")
    begin = time.monotonic()
    if parser.parse_args().quick:
        wrong = prove(("sm_80", "sm_90"), (64, 128), (torch.bfloat16,))
    else:
        wrong = prove(TARGETS, SIZES, TYPES)
    print("\nComputed, not measured:\n")
    roofline()
    print(f"\n{time.monotonic() - begin:.0f} s")
    sys.exit("\n".join(wrong) or 0)


if __name__ == "__main__":
    main()
