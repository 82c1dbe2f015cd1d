"""Attention against loops in float64 over the rule as it is written (conftest.attention_by_loops)."""

import pytest
import torch
from conftest import attention_by_loops, random_tensor, relative

from attention import attention, shared_prefix_attention, step_masks


def qkv(B, H, H_kv, T, S, D, dtype=torch.float32):
    k, v = (random_tensor(B, H_kv, S, D, dtype=dtype, seed=seed) for seed in (1, 2))
    return random_tensor(B, H, T, D, dtype=dtype), k, v


# B, H, H_kv, T, S, D
SIZES = [(2, 4, 4, 7, 7, 12), (1, 6, 2, 33, 33, 24), (2, 4, 1, 7, 33, 80)]
SIZES += [(2, 3, 3, 1, 1, 24), (1, 8, 2, 1, 33, 12), (1, 2, 2, 32, 33, 16)]
SEGMENTS = [  # [B][S]: a prefix and continuations; padding before the prefix or behind it; no prefix, only padding
    [[0] * 9 + [1] * 5 + [2] * 7, [0] * 4 + [1] * 3 + [2] * 6 + [3] * 5 + [-1] * 3],
    [[-1] * 6 + [0] * 8 + [1] * 7, [0] * 3 + [-1] * 6 + [1] * 6 + [2] * 6],
    [[1] * 6 + [2] * 1 + [3] * 14, [-1] * 21],
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_causal_is_the_rule_with_every_segment_zero(sizes):
    q, k, v = qkv(*sizes)
    zeros = [[0] * k.shape[2]] * len(k)
    assert relative(attention(q, k, v, causal=True), attention_by_loops(q, k, v, zeros)) < 1e-5


@pytest.mark.parametrize("sizes", [*SIZES, (1, 4, 2, 33, 7, 12)], ids=str)
def test_bidirectional_attention_sees_everything(sizes):
    q, k, v = qkv(*sizes)
    assert relative(attention(q, k, v), attention_by_loops(q, k, v)) < 1e-5


@pytest.mark.parametrize("segments", SEGMENTS)
@pytest.mark.parametrize(("H", "H_kv", "T", "D"), [(4, 2, 21, 12), (3, 3, 8, 24), (4, 1, 1, 80)])
def test_segments_see_the_prefix_and_themselves(segments, H, H_kv, T, D):
    q, k, v = qkv(2, H, H_kv, T, 21, D)
    out = attention(q, k, v, segments=torch.tensor(segments))
    torch.testing.assert_close(out.double(), attention_by_loops(q, k, v, segments), atol=2e-5, rtol=1e-5)


def test_queries_that_see_nothing_get_zeros():
    q, k, v = qkv(1, 2, 2, 5, 5, 12)
    out = attention(q, k, v, segments=torch.tensor([[-1, -1, 1, -1, 2]]))
    assert not out[:, :, [0, 1, 3]].any() and torch.equal(out[:, :, [2, 4]], v[:, :, [2, 4]])


@pytest.mark.parametrize("segments", [None, *SEGMENTS])
@pytest.mark.parametrize("T", [21, 8])
def test_gradients_follow_the_rule(segments, T):
    mask = dict(causal=True) if segments is None else dict(segments=torch.tensor(segments))
    inputs = [x.requires_grad_() for x in qkv(2, 4, 2, T, 21, 24)]
    reference = [x.detach().double().requires_grad_() for x in inputs]
    weights = random_tensor(2, 4, T, 24, seed=3)
    attention(*inputs, **mask).backward(weights)
    attention_by_loops(*reference, segments or [[0] * 21] * 2).backward(weights.double())
    for x, y in zip(inputs, reference, strict=True):
        torch.testing.assert_close(x.grad.double(), y.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near(dtype):
    q, k, v = qkv(2, 4, 2, 21, 21, 80, dtype=dtype)
    for mask, segments in [({"causal": True}, [[0] * 21] * 2), ({"segments": torch.tensor(SEGMENTS[0])}, SEGMENTS[0])]:
        out = attention(q, k, v, **mask)
        assert out.dtype == dtype and relative(out, attention_by_loops(q, k, v, segments)) < 1e-2


# ----------------------------------------------------------------------------------------- shared prefix

STEPS = [(4, 4, 1, 1, 12, 7), (6, 2, 2, 5, 24, 33), (4, 1, 3, 7, 80, 9), (8, 4, 3, 1, 16, 1)]  # H, H_kv, K, S, D, P


def decoding_step(H, H_kv, K, S, D, P, dtype=torch.float32):
    """Arguments of shared_prefix_attention for three prefixes of different lengths, with garbage behind each."""
    lengths = torch.tensor([P, 1, P // 2 + 1])
    q = random_tensor(3, H, K, D, dtype=dtype)
    # room for three more positions
    suffix_k, suffix_v = (random_tensor(3, H_kv, K, S + 3, D, dtype=dtype, seed=seed) for seed in (1, 2))
    suffix_k[..., S:, :], suffix_v[..., S:, :] = 3e4, -3e4
    prefix_k, prefix_v = (random_tensor(3, H_kv, P, D, dtype=dtype, seed=seed) for seed in (3, 4))
    for b, length in enumerate(lengths):
        prefix_k[b, :, length:], prefix_v[b, :, length:] = 3e4, -3e4
    return q, prefix_k, prefix_v, suffix_k, suffix_v, lengths, S


def one_by_one(q, prefix_k, prefix_v, suffix_k, suffix_v, lengths, S, window):
    """Each continuation as ordinary attention of its newest position over a row of its own: prefix, then suffix."""
    out = torch.empty(q.shape, dtype=torch.float64)
    for b, length in enumerate(lengths):
        for k in range(q.shape[2]):
            keys = torch.cat((prefix_k[b, :, :length], suffix_k[b, :, k, :S]), 1)[None]
            values = torch.cat((prefix_v[b, :, :length], suffix_v[b, :, k, :S]), 1)[None]
            out[b, :, k] = attention_by_loops(q[b : b + 1, :, k : k + 1], keys, values, window=window)[0, :, 0]
    return out


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("sizes", STEPS, ids=str)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-2)])
def test_shared_prefix_is_ordinary_attention_of_each_continuation(sizes, window, dtype, limit):
    arguments = decoding_step(*sizes, dtype=dtype)
    *tensors, lengths, S = arguments
    H_kv, P = tensors[1].shape[1:3]
    masks = step_masks(lengths, torch.tensor(S - 1), (H_kv, P, S + 3), window, dtype)
    out = shared_prefix_attention(*tensors, masks)
    assert out.dtype == dtype and relative(out, one_by_one(*arguments, window)) < limit
