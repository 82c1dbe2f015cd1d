"""The fused kernel: its results (tests/kernel_numerics.py), its machine code, when it is chosen, what replaces it."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import GOLDEN, ROOT, random_tensor

import attention
import kernel

sys.path.insert(0, str(ROOT / "assets"))
import mask

ROW = torch.zeros(1, 33, dtype=torch.long)
needs_triton = pytest.mark.skipif(kernel.triton is None, reason="Triton exists for Linux only")


def run(*arguments, **environment):
    """Run Python in a new process: Triton decides when it is imported whether it compiles or interprets."""
    command, environment = [sys.executable, *arguments], os.environ | environment
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    return done


@needs_triton
@pytest.mark.parametrize("interpreted", ["1", "0"] if torch.cuda.is_available() else ["1"])
def test_the_kernel_computes_what_loops_compute(interpreted):
    assert " passed" in run("-m", "pytest", "tests/kernel_numerics.py", TRITON_INTERPRET=interpreted).stdout


@needs_triton
def test_the_machine_code_uses_tensor_cores(tmp_path):
    printed = run("-m", "bench.kernel_proofs", "--quick", TRITON_CACHE_DIR=str(tmp_path)).stdout
    assert printed.count("wgmma") == 6  # attention on sm_90: two head sizes, three kernels
    assert printed.count("mma.sync") == 6 + 4  # attention on sm_80, and int8 layers on both, in two tiles


@pytest.mark.parametrize(("T", "D", "given", "chosen"), [
    (33, 64, dict(segments=ROW), "fused_attention"),
    (33, 512, dict(segments=ROW), "plain_attention"),  # more than the kernel's registers hold
    (33, 64, dict(segments=ROW, window=4, positions=ROW), "fused_attention"),
    (33, 64, dict(window=4), "fused_attention"),
    (33, 64, dict(window=33), "plain_attention"),  # hides nothing
    (8, 64, dict(causal=True), "fused_attention"),
    (33, 64, dict(causal=True), "plain_attention"),
    (1, 64, dict(causal=True), "plain_attention"),
    (33, 64, dict(), "plain_attention"),
])  # fmt: skip
def test_the_kernel_is_chosen_for_masks_that_pytorch_has_no_kernel_for(monkeypatch, T, D, given, chosen):
    calls = []
    for name in ("fused_attention", "plain_attention"):
        monkeypatch.setattr(attention, name, lambda *_, name=name, **__: calls.append(name))
    q, k = random_tensor(1, 1, T, D), random_tensor(1, 1, 33, D)
    for available in (True, False):
        monkeypatch.setattr(attention, "kernel_available", lambda device, available=available: available)
        attention.attention(q, k, k, **given)
    attention.attention(q, k, k, **given, impl="torch")
    assert calls == [chosen, "plain_attention", "plain_attention"]


def test_without_a_gpu_the_kernel_is_refused_in_one_line():
    q = random_tensor(1, 1, 5, 16)
    assert not kernel.kernel_available("cpu")
    with pytest.raises(ValueError, match=r"^.*Triton.* cpu.*$"):
        attention.attention(q, q, q, causal=True, impl="triton")


def test_without_triton_pytorch_computes_everything():
    code = """if True:
        import sys
        sys.modules["triton"] = None  # as if it were not installed
        import torch, attention
        q = torch.ones(1, 1, 4, 16)
        print(attention.attention(q, q, q, segments=torch.tensor([[0, 0, 1, -1]])).sum(-1).tolist())"""
    assert run("-c", code, PYTHONPATH=str(ROOT)).stdout == "[[[16.0, 16.0, 16.0, 16.0]]]\n"


def test_verbose_says_once_what_computes_attention():
    lines = run("sample.py", "--model", GOLDEN / "libra-7b" / "model", "--device", "cpu", "--images",
                GOLDEN / "images" / "0.png", "--max-new-tokens", "3", "--verbose").stderr.splitlines()  # fmt: skip
    assert len(lines) == len(set(lines)) and all(line.endswith(": torch") for line in lines)
    kinds = {line.split(" on cpu, ")[0] for line in lines}
    assert kinds == {"sample.py: attention with no mask", "sample.py: attention with causal"}


def test_the_picture_of_the_mask_is_what_its_script_draws():
    assert (ROOT / "assets" / "mask.svg").read_text() == mask.draw()
