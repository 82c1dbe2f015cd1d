import itertools
import math

import pytest
import torch
from conftest import relative

from attention import attention, shared_prefix_attention


def by_the_book(q, k, v, segments=None, window=None, positions=None):
    """Attention in float64, one query at a time, over the keys that the rule, as it is written, lets it see.

    segments, lists of B: the rule; None: everything is seen. window counts positions, lists of B, or without them
    places. A query that sees nothing sums over nothing: zeros.
    """
    (B, H, T, D), (H_kv, S) = q.shape, k.shape[1:3]
    q, k, v = q.double(), k.double(), v.double()
    rows = []
    for b, h, t in itertools.product(range(B), range(H), range(T)):
        seen = list(range(S))
        if segments is not None:
            i, segment = S - T + t, segments[b]
            seen = [j for j in seen if j <= i and segment[j] != -1 and segment[j] in (0, segment[i])]
        if window is not None:
            place = list(range(S)) if positions is None else positions[b]
            seen = [j for j in seen if place[S - T + t] - place[j] < window]
        keys, values = (x[b, h // (H // H_kv), seen] for x in (k, v))
        rows.append((keys @ q[b, h, t] / math.sqrt(D)).softmax(0) @ values)
    return torch.stack(rows).view(B, H, T, D)


def draw(*shape, dtype=torch.float32, seed=0):
    """Keys and values far enough from 0 that no softmax is flat."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul(1.5).to(dtype)


def qkv(B, H, H_kv, T, S, D, dtype=torch.float32):
    return draw(B, H, T, D, dtype=dtype), *(draw(B, H_kv, S, D, dtype=dtype, seed=seed) for seed in (1, 2))


SIZES = [  # B, H, H_kv, T, S, D
    (2, 4, 4, 7, 7, 12), (1, 6, 2, 33, 33, 24), (2, 4, 1, 7, 33, 80), (2, 3, 3, 1, 1, 24), (1, 8, 2, 1, 33, 12),
    (1, 2, 2, 32, 33, 16),
]  # fmt: skip
PREFIX_AND_TWO = [0] * 9 + [1] * 5 + [2] * 7  # one prefix, two continuations
SEGMENTS = [  # [B][S], what the last T positions of each row may see
    [PREFIX_AND_TWO, [0] * 4 + [1] * 3 + [2] * 6 + [3] * 5 + [-1] * 3],
    [[-1] * 6 + [0] * 8 + [1] * 7, [0] * 3 + [-1] * 6 + [1] * 6 + [2] * 6],  # padding in front, and behind the prefix
    [[1] * 6 + [2] * 1 + [3] * 14, [-1] * 21],  # no prefix; nothing but padding
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_causal_is_the_rule_with_every_segment_zero(sizes):
    q, k, v = qkv(*sizes)
    assert relative(attention(q, k, v, causal=True), by_the_book(q, k, v, [[0] * sizes[4]] * sizes[0])) < 1e-5


@pytest.mark.parametrize("sizes", [*SIZES, (1, 4, 2, 33, 7, 12)], ids=str)
def test_bidirectional_sees_everything(sizes):
    q, k, v = qkv(*sizes)
    assert relative(attention(q, k, v), by_the_book(q, k, v)) < 1e-5


@pytest.mark.parametrize("segments", SEGMENTS)
@pytest.mark.parametrize(("heads", "T", "D"), [((4, 2), 21, 12), ((3, 3), 8, 24), ((4, 1), 1, 80)])
def test_segments_see_the_prefix_and_themselves(segments, heads, T, D):
    q, k, v = qkv(2, *heads, T, 21, D)
    out, reference = attention(q, k, v, segments=torch.tensor(segments)), by_the_book(q, k, v, segments)
    torch.testing.assert_close(out.double(), reference, atol=2e-5, rtol=1e-5)


def test_queries_that_see_nothing_give_zeros():
    q, k, v = qkv(1, 2, 2, 5, 5, 12)
    out = attention(q, k, v, segments=torch.tensor([[-1, -1, 1, -1, 2]]))
    assert not out[:, :, [0, 1, 3]].any() and torch.equal(out[:, :, [2, 4]], v[:, :, [2, 4]])


@pytest.mark.parametrize("segments", [None, *SEGMENTS])
@pytest.mark.parametrize("T", [21, 8])
def test_gradients_follow_the_rule(segments, T):
    ours = [x.requires_grad_() for x in qkv(2, 4, 2, T, 21, 24)]
    reference = [x.detach().double().requires_grad_() for x in ours]
    weights = draw(2, 4, T, 24, seed=3)
    mask = dict(causal=True) if segments is None else dict(segments=torch.tensor(segments))
    attention(*ours, **mask).backward(weights)
    by_the_book(*reference, segments or [[0] * 21] * 2).backward(weights.double())
    for x, y in zip(ours, reference, strict=True):
        torch.testing.assert_close(x.grad.double(), y.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near(dtype):
    q, k, v = qkv(2, 4, 2, 21, 21, 80, dtype=dtype)
    for mask, segments in ({"causal": True}, [[0] * 21] * 2), ({"segments": torch.tensor(SEGMENTS[0])}, SEGMENTS[0]):
        out = attention(q, k, v, **mask)
        assert out.dtype == dtype and relative(out, by_the_book(q, k, v, segments)) < 1e-2


# ----------------------------------------------------------------------------------------- shared prefix


def step(H, H_kv, K, S, D, P, dtype=torch.float32):
    """Arguments of shared_prefix_attention for ragged prefixes, with garbage behind each."""
    lengths = torch.tensor([P, 1, P // 2 + 1])
    B = len(lengths)
    q, suffix_k, suffix_v = draw(B, H, K, D), draw(B, K, H_kv, S, D, seed=1), draw(B, K, H_kv, S, D, seed=2)
    prefix_k, prefix_v = draw(B, H_kv, P, D, seed=3), draw(B, H_kv, P, D, seed=4)
    for b, length in enumerate(lengths):
        prefix_k[b, :, length:], prefix_v[b, :, length:] = 3e4, -3e4
    return q.to(dtype), prefix_k.to(dtype), prefix_v.to(dtype), lengths, suffix_k.to(dtype), suffix_v.to(dtype)


def one_by_one(q, prefix_k, prefix_v, lengths, suffix_k, suffix_v):
    """Every continuation as ordinary attention of its newest position over its own row: prefix, then suffix."""
    out = torch.empty(q.shape, dtype=torch.float64)
    for b, k in itertools.product(range(q.shape[0]), range(q.shape[2])):
        rows = (
            torch.cat((prefix[b, :, : lengths[b]], suffix[b, k]), 1)[None]
            for prefix, suffix in ((prefix_k, suffix_k), (prefix_v, suffix_v))
        )
        out[b, :, k] = by_the_book(q[b : b + 1, :, k : k + 1], *rows)[0, :, 0]
    return out


STEPS = [(4, 4, 1, 1, 12, 7), (6, 2, 2, 5, 24, 33), (4, 1, 3, 7, 80, 9), (8, 4, 3, 1, 16, 1)]  # H, H_kv, K, S, D, P


@pytest.mark.parametrize("sizes", STEPS, ids=str)
def test_shared_prefix_is_ordinary_attention_of_each_continuation(sizes):
    arguments = step(*sizes)
    assert relative(shared_prefix_attention(*arguments), one_by_one(*arguments)) < 1e-5


@pytest.mark.parametrize("sizes", STEPS, ids=str)
def test_shared_prefix_is_attention_with_a_segment_for_each_continuation(sizes):
    q, prefix_k, prefix_v, lengths, suffix_k, suffix_v = step(*sizes)
    H, _, K, S, D, P = sizes
    segments = torch.tensor([[0] * n + [-1] * (P - n) + [k + 1 for k in range(K) for _ in range(S)] for n in lengths])
    keys, values = (
        torch.cat((prefix, suffix.transpose(1, 2).flatten(2, 3)), 2)
        for prefix, suffix in ((prefix_k, suffix_k), (prefix_v, suffix_v))
    )
    queries = draw(len(lengths), H, K, S, D, seed=5)
    queries[:, :, :, -1] = q
    whole = attention(queries.flatten(2, 3), keys, values, segments=segments).unflatten(2, (K, S))[:, :, :, -1]
    assert relative(shared_prefix_attention(q, prefix_k, prefix_v, lengths, suffix_k, suffix_v), whole) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_shared_prefix_in_half_precision_stays_near(dtype):
    arguments = step(6, 2, 3, 7, 80, 33, dtype=dtype)
    out = shared_prefix_attention(*arguments)
    assert out.dtype == dtype and relative(out, one_by_one(*arguments)) < 2e-2
