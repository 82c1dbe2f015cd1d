"""The kernel against loops in float64: every mask, forward and backward, at odd sizes. `tests/test_kernel.py` runs it.

    TRITON_INTERPRET=1 python -m pytest tests/kernel_numbers.py      without a GPU: Triton's interpreter, on the CPU
    python -m pytest tests/kernel_numbers.py                         on a GPU

The interpreter's bfloat16 products are wrong (numpy has no such type): there bfloat16 is only loaded, cast and stored.
"""

import pytest
import torch
import triton
import triton.language as tl
from conftest import relative
from test_attention import by_the_book, draw

import attention
import kernel
from kernel import constexpr, jit

INTERPRETED = triton.knobs.runtime.interpret
DEVICE = "cpu" if INTERPRETED else "cuda"


def positions_of(segments):
    """Places in a row, where every segment goes on behind the prefix."""
    count = {}
    places = []
    for segment in segments:
        places.append(count.get(0, 0) * (segment > 0) + count.get(segment, 0))
        count[segment] = count.get(segment, 0) + 1
    return places


SHARED = [[0] * 70 + [1] * 9 + [2] * 40 + [3] * 11 + [-1] * 5, [0] * 3 + [1] * 66 + [2] * 66]
PADDED = [[-1] * 68 + [0] * 40 + [1] * 27, [0] * 30 + [-1] * 90 + [1] * 15]  # in front; behind the prefix
ODD = [[1, 2, 3] * 45, [-1] * 135]  # no prefix, one in the other; nothing but padding
MASKS = {  # name -> (T, S, arguments of `attention`, of the loops where they differ)
    "no mask": (67, 67, {}, {}),
    "no mask, more keys": (5, 131, {}, {}),
    "no mask, more queries": (131, 5, {}, {}),
    "causal": (135, 135, dict(causal=True), dict(segments=[[0] * 135] * 2)),
    "causal, behind keys": (9, 135, dict(causal=True), dict(segments=[[0] * 135] * 2)),
    "causal, one query": (1, 33, dict(causal=True), {}),
    "lengths": (70, 70, dict(segments=[[0] * 70, [0] * 33 + [-1] * 37]), {}),
    "shared": (135, 135, dict(segments=SHARED), {}),
    "shared, behind keys": (50, 135, dict(segments=SHARED), {}),
    "padded": (135, 135, dict(segments=PADDED), {}),
    "odd": (135, 135, dict(segments=ODD), {}),
    "window": (135, 135, dict(window=40), dict(segments=[[0] * 135] * 2)),
    "window, behind keys": (50, 135, dict(window=7), dict(segments=[[0] * 135] * 2)),
    "shared, window": (135, 135, dict(segments=SHARED, window=40, positions=[*map(positions_of, SHARED)]), {}),
    "window wider than the row": (33, 33, dict(segments=[s[:33] for s in SHARED], window=99), {}),
}
HEADS = [(2, 2, 24), (2, 1, 64), (1, 1, 80), (4, 2, 16), (1, 1, 128)]  # query heads, key heads, head size
SIZES = (16, 24, 64, 72, 80, 96, 128, 256)
CASES = [(mask, *HEADS[number % len(HEADS)], torch.float16) for number, mask in enumerate(MASKS)]
CASES += [(mask, 1, 1, 24, torch.float32) for mask in MASKS]
CASES += [("shared, behind keys", 1, 1, D, dtype) for D in SIZES for dtype in (torch.float32, torch.float16)]
if not INTERPRETED:
    CASES += [(*case, torch.bfloat16) for *case, dtype in CASES if dtype == torch.float16]


def relative_or_absolute(x, y):
    """Relative error of a whole tensor; what is zero must be zero to the bit."""
    return relative(x.double().cpu(), y) if y.any() else float(x.abs().max())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernel_is_the_rule(case):
    mask, H, H_kv, D, dtype = case
    T, S, given, book = MASKS[mask]
    # [B, T, H, D] in memory, as the projections leave them
    q, k, v = (draw(2, length, heads, D, dtype=dtype, seed=seed).transpose(1, 2).to(DEVICE).requires_grad_()
               for seed, (length, heads) in enumerate([(T, H), (S, H_kv), (S, H_kv)]))  # fmt: skip
    weights = draw(2, H, T, D, dtype=dtype, seed=3)
    tensors = {name: torch.tensor(value, device=DEVICE) if isinstance(value, list) else value
               for name, value in given.items()}  # fmt: skip
    out = attention.attention(q, k, v, **tensors, impl="triton")
    out.backward(weights.to(DEVICE))
    reference = [x.detach().double().cpu().requires_grad_() for x in (q, k, v)]
    rule = {name: value for name, value in given.items() if name != "causal"} | book
    expected = by_the_book(*reference, **rule)
    expected.backward(weights.double())
    assert out.dtype == dtype and out.stride() == q.stride()
    limit = 2e-6 if dtype == torch.float32 else 1e-3 if dtype == torch.float16 else 8e-3
    assert relative_or_absolute(out.detach(), expected.detach()) < limit
    for x, y in zip((q, k, v), reference, strict=True):
        assert x.grad.isfinite().all()
        assert relative_or_absolute(x.grad, y.grad) < limit


@pytest.mark.parametrize("mask", MASKS)
def test_exactly_the_blocks_that_hold_something_visible_are_visited(mask):
    T, S, given, _ = MASKS[mask]
    M, N = 16, 32
    segments, positions = (torch.tensor(given[name]) if name in given else None for name in ("segments", "positions"))
    window = given.get("window")
    seen = attention._visible(segments, T, S, window, positions) if given else torch.ones(1, 1, T, S, dtype=torch.bool)
    B = len(seen)
    devices = (x if x is None else x.to(DEVICE) for x in (segments, positions))
    prepared = kernel._mask(*devices, mask, bool(given), window, T, S, torch.device(DEVICE))
    for by_key in (False, True):
        visits, stride, inner = kernel._visits(prepared, M, N, by_key)
        assert stride == (B > 1) * visits[0].numel()
        for b, outer in torch.cartesian_prod(*map(torch.arange, visits.shape[:2])).tolist():
            full, mixed, *places = visits[b, outer].tolist()
            found = sorted(places[:full]), sorted(places[len(places) - mixed :])
            rows = lambda m, n, b=b: seen[b, 0, m * M : (m + 1) * M, n * N : (n + 1) * N]
            blocks = [rows(other, outer) if by_key else rows(outer, other) for other in range(inner)]
            whole = [x.all() and x.shape[1] == N for x in blocks]  # a block that ends behind the keys needs its mask
            assert found[0] == [n for n, x in enumerate(blocks) if whole[n]]
            assert found[1] == [n for n, x in enumerate(blocks) if x.any() and not whole[n]]


def test_a_mask_that_changes_is_made_anew():
    q, k, v = (draw(1, 2, 20, 16, seed=seed).to(DEVICE) for seed in range(3))
    segments = torch.zeros(1, 20, dtype=torch.long, device=DEVICE)
    run = lambda: attention.attention(q, k, v, segments=segments, impl="triton")
    first = run()
    segments[0, :5] = -1
    second = run()
    assert (second[:, :, 5:] != first[:, :, 5:]).any(-1).all() and not second[:, :, :5].any()
    with torch.inference_mode():
        others = segments.clone()
        assert torch.equal(attention.attention(q, k, v, segments=others, impl="triton"), second)
        others.zero_()
        assert torch.equal(attention.attention(q, k, v, segments=others, impl="triton"), first)


def test_autocast_chooses_the_type_as_for_pytorch_s_kernels():
    q, k, v = (draw(1, 2, 20, 16, seed=seed).to(DEVICE).requires_grad_() for seed in range(3))
    with torch.autocast(DEVICE, torch.float16):
        out, plain = (attention.attention(q, k.half(), v, causal=True, impl=impl) for impl in ("triton", "torch"))
    assert out.dtype == plain.dtype == torch.float16 and relative(out.detach().float(), plain.detach().float()) < 2e-3
    (gradient,) = torch.autograd.grad(out.float().sum(), q)
    assert gradient.dtype == torch.float32


def test_what_is_not_dense_is_copied():
    q, k, v = (draw(1, 2, 16, 20, seed=seed).to(DEVICE).mT.requires_grad_() for seed in range(3))  # [1, 2, 20, 16]
    out, plain = (attention.attention(q, k, v, causal=True, impl=impl) for impl in ("triton", "torch"))
    # the gradient of a sum is one number for all, with strides of 0
    ours, theirs = (torch.autograd.grad(x.sum(), (q, k, v)) for x in (out, plain))
    assert all(relative(x.detach(), y.detach()) < 1e-5 for x, y in zip((out, *ours), (plain, *theirs), strict=True))


@jit
def _copy_kernel(x, y, count, D: constexpr, WIDTH: constexpr, M: constexpr):
    t = tl.program_id(0) * M + tl.arange(0, M)
    b, h = tl.program_id(1) * 0, tl.program_id(2)
    kernel._store(y, b, h, t, count, kernel._load(x, b, h, t, count, D, WIDTH).to(tl.float32), D, WIDTH)


@pytest.mark.parametrize("D", [16, 24, 80])
def test_bfloat16_is_loaded_cast_and_stored(D):
    x = draw(1, 37, 2, D, dtype=torch.bfloat16).transpose(1, 2).to(DEVICE)
    y = torch.full_like(x, 7)
    width = triton.next_power_of_2(D)
    _copy_kernel[3, 1, 2](kernel._strided(x), kernel._strided(y), 35, D=D, WIDTH=width, M=16)
    assert torch.equal(y[:, :, :35], x[:, :, :35]) and (y[:, :, 35:] == 7).all()
