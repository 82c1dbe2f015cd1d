"""The kernels against loops in float64 (conftest.attention_by_loops): every mask, forward and backward, at odd sizes.

`tests/test_kernel.py` runs this file in Triton's interpreter (TRITON_INTERPRET=1) and, if there is a GPU, compiled. The
interpreter's bfloat16 products are wrong (numpy has no such type): there bfloat16 is only loaded, cast and stored.
"""

import pytest
import torch
from conftest import attention_by_loops, random_tensor, relative

import kernel
from attention import attention, visible
from kernel import constexpr, jit, tl, triton
from plumbing import int8_kernel, quantised

DEVICE = torch.device("cpu" if kernel.interpreted() else "cuda")


def positions_of(segments):
    """Every segment continues behind the prefix: segments 0 0 1 1 2 have positions 0 1 2 3 2."""
    starts = {segment: segments.index(segment) - segments.count(0) * (segment > 0) for segment in set(segments)}
    return [place - starts[segment] for place, segment in enumerate(segments)]


ZEROS = [[0] * 135] * 2
SHARED = [[0] * 70 + [1] * 9 + [2] * 40 + [3] * 11 + [-1] * 5, [0] * 3 + [1] * 66 + [2] * 66]
PADDED = [[-1] * 68 + [0] * 40 + [1] * 27, [0] * 30 + [-1] * 90 + [1] * 15]  # before the prefix; behind it
ODD = [[1, 2, 3] * 45, [-1] * 135]  # no prefix; nothing but padding
MASKS = {  # name -> (T, S, arguments of `attention`, those of the loops if they differ)
    "no mask": (67, 67, {}, {}),
    "no mask, more keys": (5, 131, {}, {}),
    "no mask, more queries": (131, 5, {}, {}),
    "causal": (135, 135, dict(causal=True), dict(segments=ZEROS)),
    "causal, behind keys": (9, 135, dict(causal=True), dict(segments=ZEROS)),
    "causal, one query": (1, 33, dict(causal=True), dict(segments=[[0] * 33] * 2)),
    "lengths": (70, 70, dict(segments=[[0] * 70, [0] * 33 + [-1] * 37]), {}),
    "shared": (135, 135, dict(segments=SHARED), {}),
    "shared, behind keys": (50, 135, dict(segments=SHARED), {}),
    "padded": (135, 135, dict(segments=PADDED), {}),
    "odd": (135, 135, dict(segments=ODD), {}),
    "window": (135, 135, dict(window=40), dict(segments=ZEROS, window=40)),
    "window, behind keys": (50, 135, dict(window=7), dict(segments=ZEROS, window=7)),
    "shared, window": (135, 135, dict(segments=SHARED, window=40, positions=[*map(positions_of, SHARED)]), {}),
    "window wider than the row": (33, 33, dict(segments=[s[:33] for s in SHARED], window=99), {}),
}
HEADS = [(2, 2, 24), (2, 1, 64), (1, 1, 80), (4, 2, 16), (1, 1, 128)]  # query heads, key heads, head size
SIZES = (16, 24, 64, 72, 80, 96, 128, 256)
CASES = [(mask, *HEADS[number % 5], torch.float16) for number, mask in enumerate(MASKS)]
CASES += [(mask, 1, 1, 24, torch.float32) for mask in MASKS]
CASES += [("shared, behind keys", 1, 1, D, dtype) for D in SIZES for dtype in (torch.float32, torch.float16)]
if not kernel.interpreted():
    CASES += [(*case, torch.bfloat16) for *case, dtype in CASES if dtype == torch.float16]
LIMITS = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def tensors(given):
    return {name: torch.tensor(x, device=DEVICE) if isinstance(x, list) else x for name, x in given.items()}


def error(x, y):
    """The relative error of a whole tensor; where the reference is zero, the tensor must be zero to the bit."""
    x = x.detach().double().cpu()
    return relative(x, y) if y.any() else float(x.abs().max())


@pytest.mark.parametrize(("mask", "H", "H_kv", "D", "dtype"), CASES)
def test_the_kernels_follow_the_rule(mask, H, H_kv, D, dtype):
    T, S, given, differing = MASKS[mask]
    # [B, T, H, D] in memory, as the projections of a layer leave it
    shapes = [(2, T, H, D), (2, S, H_kv, D), (2, S, H_kv, D)]
    inputs = [random_tensor(*shape, dtype=dtype, seed=seed) for seed, shape in enumerate(shapes)]
    inputs = [x.transpose(1, 2).to(DEVICE).requires_grad_() for x in inputs]
    weights = random_tensor(2, H, T, D, dtype=dtype, seed=3)
    out = attention(*inputs, **tensors(given), impl="triton")
    out.backward(weights.to(DEVICE))

    reference = [x.detach().double().cpu().requires_grad_() for x in inputs]
    expected = attention_by_loops(*reference, **(differing or given))
    expected.backward(weights.double())
    assert out.dtype == dtype and out.stride() == inputs[0].stride()
    assert error(out, expected.detach()) < LIMITS[dtype]
    for x, y in zip(inputs, reference, strict=True):
        assert x.grad.isfinite().all() and error(x.grad, y.grad) < LIMITS[dtype]


@pytest.mark.parametrize("by_key", [False, True])
@pytest.mark.parametrize("name", MASKS)
def test_exactly_the_blocks_that_hold_something_visible_are_visited(name, by_key):
    T, S, given, _ = MASKS[name]
    M, N = 16, 32
    segments, positions = tensors(given).get("segments"), tensors(given).get("positions")
    window, causal = given.get("window"), bool(given)
    mask = kernel.make_mask(segments, positions, name, causal, window, T, S, DEVICE)
    lists = kernel.list_visits(mask, M, N, by_key).lists.tolist()
    seen = visible(segments, T, S, window, positions, DEVICE)[:, 0] if causal else torch.ones(1, T, S).bool()

    for b, rows in enumerate(seen.cpu()):
        blocks = [block.split(N, 1) for block in rows.split(M)]  # [blocks of queries][blocks of keys]
        blocks = zip(*blocks, strict=True) if by_key else blocks
        for (full, mixed, *places), others in zip(lists[b], blocks, strict=True):
            # (a block that ends behind the last key needs the mask)
            whole = [n for n, block in enumerate(others) if block.all() and block.shape[1] == N]
            partly = [n for n, block in enumerate(others) if block.any() and n not in whole]
            assert sorted(places[:full]) == whole
            assert sorted(places[len(places) - mixed :]) == partly


def test_layers_share_the_mask_of_a_step_until_it_is_changed_in_place():
    q, k, v = (random_tensor(1, 2, 20, 16, seed=seed).to(DEVICE) for seed in range(3))
    layer = lambda segments: attention(q, k, v, segments=segments, impl="triton")
    segments = torch.zeros(1, 20, dtype=torch.long, device=DEVICE)
    kernel.list_visits.cache_clear()
    first, _, _ = (layer(segments) for _ in range(3))
    assert kernel.list_visits.cache_info().misses == 1
    segments[0, :5] = -1
    changed = layer(segments)
    assert (changed[:, :, 5:] != first[:, :, 5:]).any(-1).all() and not changed[:, :, :5].any()
    with torch.inference_mode():  # where PyTorch does not count changes
        others = segments.clone()
        assert torch.equal(layer(others), changed)
        others.zero_()
        assert torch.equal(layer(others), first)


def test_autocast_casts_as_for_the_kernels_of_pytorch():
    q, k, v = (random_tensor(1, 2, 20, 16, seed=seed).to(DEVICE).requires_grad_() for seed in range(3))
    with torch.autocast(DEVICE.type, torch.float16):
        fused, plain = (attention(q, k.half(), v, causal=True, impl=impl) for impl in ("triton", "torch"))
    assert fused.dtype == plain.dtype == torch.float16
    assert error(fused, plain.detach().double().cpu()) < 2e-3
    assert torch.autograd.grad(fused.float().sum(), q)[0].dtype == torch.float32


def test_rows_that_are_not_dense_are_copied():
    inputs = [random_tensor(1, 2, 16, 20, seed=seed).to(DEVICE).mT.requires_grad_() for seed in range(3)]
    fused, plain = (attention(*inputs, causal=True, impl=impl) for impl in ("triton", "torch"))
    # the gradient of a sum is one number for all, with strides of 0
    ours, theirs = (torch.autograd.grad(out.sum(), inputs) for out in (fused, plain))
    for x, y in zip((fused, *ours), (plain, *theirs), strict=True):
        assert relative(x.detach(), y.detach()) < 1e-5


@jit
def copy_kernel(x, y, count, M: constexpr):
    t = tl.program_id(0) * M + tl.arange(0, M)
    b, h = tl.program_id(1), tl.program_id(2)
    kernel.store_rows(y, b, h, t, count, kernel.load_rows(x, b, h, t, count).to(tl.float32))


@pytest.mark.parametrize("D", [16, 24, 80])
def test_bfloat16_is_loaded_cast_and_stored(D):
    x = random_tensor(1, 37, 2, D, dtype=torch.bfloat16).transpose(1, 2).to(DEVICE)
    y = torch.full_like(x, 7)
    copy_kernel[triton.cdiv(37, 16), 1, 2](kernel.describe(x), kernel.describe(y), 35, M=16)
    assert torch.equal(y[:, :, :35], x[:, :, :35]) and (y[:, :, 35:] == 7).all()


INT8_CASES = [(1, 32, 256), (3, 67, 300), (16, 1, 31), (17, 96, 128), (70, 65, 513)]  # rows, outputs, columns


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize(("rows", "height", "width"), INT8_CASES)
def test_the_int8_kernel_computes_what_the_plain_version_does(rows, height, width, dtype, monkeypatch):
    if kernel.interpreted():  # instead of bfloat16, see above
        monkeypatch.setattr(int8_kernel, "dot_type", lambda x: tl.float32)
    x = random_tensor(1, rows, width, dtype=dtype)
    weight = torch.randint(-127, 128, (height, width), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    scale, bias = random_tensor(height, seed=1).abs(), random_tensor(height, dtype=dtype, seed=2)
    out = quantised.gpu_linear(*(tensor.to(DEVICE) for tensor in (x, weight, scale, bias)))
    assert out.dtype == dtype and out.shape == (1, rows, height)
    limit = 8e-3 if dtype == torch.float32 and not kernel.interpreted() else LIMITS[dtype]
    assert error(out, quantised.plain_linear(x.double(), weight, scale, bias)) < limit


def test_the_int8_kernel_multiplies_float16_as_it_is():
    x, weight = torch.tensor([[1 / 3, 1000.0, 2**-14]]).half().to(DEVICE), torch.eye(3, dtype=torch.int8).to(DEVICE)
    assert torch.equal(int8_kernel.int8_linear(x, 127 * weight, torch.ones(3).to(DEVICE) / 127), x)
