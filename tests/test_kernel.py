"""The fused kernel: its numbers in Triton's interpreter, and on a GPU if there is one, its machine code, its choice."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import GOLDEN, ROOT
from test_attention import qkv

import attention
import kernel

sys.path.insert(0, str(ROOT / "assets"))
import mask

needs_triton = pytest.mark.skipif(kernel.triton is None, reason="Triton is for Linux")


def run(*arguments, **environment):
    """A program of its own: Triton decides as it is imported whether it compiles or interprets."""
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=os.environ | environment,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    return done.stdout


@needs_triton
@pytest.mark.parametrize("interpreted", ["1", "0"] if torch.cuda.is_available() else ["1"])
def test_the_kernel_s_numbers(interpreted):
    assert " passed" in run("-m", "pytest", "tests/kernel_numbers.py", TRITON_INTERPRET=interpreted)


@needs_triton
def test_the_kernel_s_machine_code(tmp_path):
    printed = run("-m", "bench.kernel_compile", "--quick", TRITON_CACHE_DIR=str(tmp_path))
    assert printed.count("wgmma") == printed.count("mma.sync") == 6  # two head sizes, three kernels


@pytest.mark.parametrize(
    ("given", "sizes", "chosen"),
    [
        (dict(segments=0), (33, 33, 64), "triton"),
        (dict(segments=0), (33, 33, 512), "torch"),  # more than the kernel's registers hold
        (dict(segments=0, window=4, positions=0), (33, 33, 64), "triton"),
        (dict(window=4), (33, 33, 64), "triton"),
        (dict(window=33), (33, 33, 64), "torch"),  # hides nothing
        (dict(causal=True), (8, 33, 64), "triton"),
        (dict(causal=True), (33, 33, 64), "torch"),
        (dict(causal=True), (1, 33, 64), "torch"),
        (dict(), (33, 33, 64), "torch"),
    ],
)
def test_the_kernel_is_chosen_for_what_pytorch_s_do_not_know(monkeypatch, given, sizes, chosen):
    tensors = {name: torch.zeros(1, sizes[1], dtype=torch.long) if name in ("segments", "positions") else value
               for name, value in given.items()}  # fmt: skip
    asked = []
    for name in ("fused_attention", "_plain"):
        monkeypatch.setattr(attention, name, lambda *arguments, name=name: asked.append(name))
    for available, expected in ((True, {"triton": "fused_attention", "torch": "_plain"}[chosen]), (False, "_plain")):
        monkeypatch.setattr(attention, "kernel_available", lambda device, available=available: available)
        attention.attention(*qkv(1, 1, 1, *sizes), **tensors)
        assert asked.pop() == expected
    attention.attention(*qkv(1, 1, 1, *sizes), **tensors, impl="torch")
    assert asked == ["_plain"]


def test_without_a_gpu_the_kernel_is_refused_in_one_line():
    assert not kernel.kernel_available("cpu")
    with pytest.raises(ValueError, match=r"^the Triton kernel does not run on cpu: .*leave impl out$"):
        attention.attention(*qkv(1, 1, 1, 5, 5, 16), causal=True, impl="triton")


def test_without_triton_pytorch_computes_everything():
    code = """if True:
        import sys
        sys.modules["triton"] = None  # as where it cannot be installed
        import torch, attention
        q = torch.ones(1, 1, 4, 16)
        print(attention.attention(q, q, q, segments=torch.tensor([[0, 0, 1, -1]])).sum(-1).tolist())"""
    assert run("-c", code, PYTHONPATH=str(ROOT)) == "[[[16.0, 16.0, 16.0, 16.0]]]\n"


def test_verbose_says_once_what_computes_attention():
    command = [sys.executable, ROOT / "sample.py", "--model", GOLDEN / "libra-7b" / "model", "--device", "cpu",
               "--images", GOLDEN / "images" / "0.png", "--max-new-tokens", "3", "--verbose"]  # fmt: skip
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr.splitlines()
    assert len(said) == len(set(said)) and all(line.endswith(": torch") for line in said)
    kinds = {line.split(" on cpu, ")[0] for line in said}
    assert kinds == {f"sample.py: attention with {kind}" for kind in ("no mask", "causal")}


def test_the_picture_of_the_mask_is_what_its_script_draws():
    assert (ROOT / "assets" / "mask.svg").read_text() == mask.draw()
