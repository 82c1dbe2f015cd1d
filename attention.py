"""Attention, one mask language for everything: encoder, connector, training, prefill, decoding.

Every position has a segment number. Position i sees position j when

    j <= i  and  (segment[j] == 0 or segment[j] == segment[i])

Segment 0 is the shared prefix, segments 1, 2, … are continuations that see the prefix and themselves
alone, and segment -1 is padding, which nobody sees. Plain causal attention is the case where every
segment is 0; bidirectional attention (the image encoder, the connector) has no mask at all.

A sliding window narrows what is seen to the last positions, itself included (Mistral: Jiang et al. 2023).

`attention` is computed by a fused Triton kernel, below, or by PyTorch; `_choose` says when by which.

Decoding has the same mask with one continuation per beam or sample: `shared_prefix_attention` reads the
prefix's keys and values once for all of them.
"""

import functools
import logging

import torch
import torch.nn.functional as F

from kernel import fused_attention, interpreted, kernel_available

logger = logging.getLogger(__name__)  # a library does not know its program's flags: `sample.py --verbose` shows this

# ------------------------------------------------------------------------------------------ the plain twin


def _plain(q, k, v, causal, segments, window, positions):
    """`attention` by PyTorch, with a [B or 1, 1, T, S] mask where it has no name for what is seen."""
    T, S = q.shape[2], k.shape[2]
    mask = None
    if segments is not None or window or (causal and 1 < T < S):
        mask = _visible(segments, T, S, window, positions, q.device)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal and mask is None and T > 1, enable_gqa=q.shape[1] != k.shape[1]
    )  # a lone newest position sees all keys


def _visible(segments, T, S, window=None, positions=None, device=None):
    """Boolean mask [B or 1, 1, T, S] of what the last T of S positions see; segments and positions [B, S] or None."""
    seen = torch.ones(1, T, S, dtype=torch.bool, device=device)
    if segments is not None:
        query, key = segments[:, S - T :, None], segments[:, None, :]  # [B, T, 1], [B, 1, S]
        seen = (key == 0) | ((key == query) & (key > 0))
    if window and positions is None:
        seen = seen.triu(S - T - window + 1)
    elif window:
        seen = seen & (positions[:, S - T :, None] - positions[:, None, :] < window)
    return seen.tril(S - T)[:, None]


# ------------------------------------------------------------------------------------------ attention


def _choose(q, S, causal, segments, window) -> str:
    """What computes it. PyTorch's kernels are the better choice for what they know: no mask, and plain causal.

    For segments, windows and queries behind earlier keys they want a dense mask, T × S, and skip nothing.
    """
    T, D = q.shape[2:]
    dense = segments is not None or window is not None or (causal and T < S)
    return "triton" if dense and T > 1 and D <= 256 and kernel_available(q.device) else "torch"


@functools.cache  # each line once
def _log_once(line: str):
    logger.info(line)


def attention(q, k, v, *, causal=False, segments=None, window=None, positions=None, impl=None):
    """softmax(q kᵀ / √D) v, with grouped-query heads.

    q [B, H, T, D]; k and v [B, H_kv, S, D] with H a multiple of H_kv and S >= T: the T queries are the
    last T of the S positions, so a prefill can go on behind keys that are already there.
    causal: position i sees j <= i. segments (integers, [B, S]): the mask above, which is causal too.
    window: causal, and of what is visible only the last `window` keys are seen, by their place in the row or,
    where several segments go on from one prefix, by their positions (integers, [B, S]).
    impl: "triton" or "torch" instead of the better one; ValueError where the former cannot run.
    Returns [B, H, T, D]; a query that may see nothing gets zeros.
    """
    S = k.shape[2]
    causal = causal or window is not None or segments is not None
    window = None if positions is None and window is not None and window >= S else window
    chosen = impl or _choose(q, S, causal, segments, window)
    if impl == "triton" and not (kernel_available(q.device) or interpreted()):
        raise ValueError(f"the Triton kernel does not run on {q.device}: it needs Triton and a GPU; leave impl out")
    kind = "segments" if segments is not None else "a window" if window else "causal" if causal else "no mask"
    _log_once(f"attention with {kind} on {q.device.type}, head size {q.shape[-1]}: {chosen}")
    return (fused_attention if chosen == "triton" else _plain)(q, k, v, causal, segments, window, positions)


def shared_prefix_attention(q, prefix_k, prefix_v, lengths, suffix_k, suffix_v, window=None):
    """One decoding step of K continuations of each of B studies: one softmax over prefix and own suffix.

    q [B, H, K, D], the newest position of each continuation.
    prefix_k, prefix_v [B, H_kv, P, D]: one copy per study, read once for all its K continuations; only
    the first lengths[b] positions of study b count (lengths: integers, [B]).
    suffix_k, suffix_v [B, K, H_kv, S, D]: what each continuation has added, newest position included.
    window: only the last `window` positions are seen, the newest included.
    Returns [B, H, K, D].

    There is no kernel of its own for this, for on paper there is little to win. What it would save is the scores,
    written and read again for 16 bytes each (two products, a mask, a concatenation, a softmax). In a layer of the 7B
    model with 10 continuations of 1,431 positions that is 7 MB a study, beside 23 MB of keys and values and 405 MB
    of weights: 1.7 % of a step's bytes with one study and 13 % with sixteen, if all of it went through memory; but each
    of those tensors has at most 15 MB, which a data-centre GPU's cache of 40 MB and more hands from one to the next.
    """
    B, H, K, D = q.shape
    H_kv, P, S = prefix_k.shape[1], prefix_k.shape[2], suffix_k.shape[3]
    R = H // H_kv
    q = (q * D**-0.5).view(B, H_kv, R, K, D)
    # Grouping the K continuations and the R query heads of one key head into one matrix makes the
    # prefix product a single GEMM that reads every prefix key once.
    prefix_scores = q.reshape(B, H_kv, R * K, D) @ prefix_k.mT  # [B, H_kv, R * K, P]
    places = torch.arange(P, device=q.device)
    hidden = places >= lengths[:, None]  # [B, P]
    suffix_scores = q.permute(0, 3, 1, 2, 4) @ suffix_k.mT  # [B, K, H_kv, R, S]
    if window is not None:
        hidden |= places <= lengths[:, None] + S - 1 - window
        suffix_scores[..., : max(S - window, 0)] = float("-inf")
    prefix_scores = prefix_scores.masked_fill(hidden[:, None, None], float("-inf"))
    suffix_scores = suffix_scores.permute(0, 2, 3, 1, 4).reshape(B, H_kv, R * K, S)
    weights = torch.cat((prefix_scores, suffix_scores), -1).softmax(-1)  # summed in float32, rounded once
    prefix_weights, suffix_weights = weights.split((P, S), -1)
    suffix_weights = suffix_weights.view(B, H_kv, R, K, S).permute(0, 3, 1, 2, 4)  # [B, K, H_kv, R, S]
    suffix_out = (suffix_weights @ suffix_v).permute(0, 2, 3, 1, 4)  # [B, H_kv, R, K, D]
    # padded prefix rows have weight 0, but 0 * uninitialised memory could be NaN: the cache starts as zeros
    prefix_out = (prefix_weights @ prefix_v).view(B, H_kv, R, K, D)
    return (prefix_out + suffix_out).reshape(B, H, K, D)
