"""Attention for the encoder, the connector, training, prefill and decoding: who sees whom, and how it is computed.

Every position has a segment number. Position i sees position j when

    j <= i  and  (segment[j] == 0 or segment[j] == segment[i])

Segment 0 is the shared prefix. Segments 1, 2, … are continuations: each sees the prefix and itself, but no other
continuation. Segment -1 is padding, which nobody sees. A prefix of three positions, two continuations, padding:

                     0  0  0  1  1  2  2 -1      segment of j
    i = 0   0        x
        1   0        x  x
        2   0        x  x  x
        3   1        x  x  x  x
        4   1        x  x  x  x  x
        5   2        x  x  x  .  .  x
        6   2        x  x  x  .  .  x  x
        7  -1        x  x  x  .  .  .  .  .     (what padding sees is never used)

Causal attention is the case in which every segment is 0. Bidirectional attention (encoder, connector) has no mask.
A sliding window also hides all but the last `window` positions, the query's own included (Mistral: Jiang et al. 2023).

In this file: the mask, attention in plain PyTorch, the choice between that and the fused kernel of kernel.py, and the
decoding step, in which the beams or samples of a study are continuations that share one copy of its prefix.
"""

import functools
import logging
from typing import NamedTuple

import torch
import torch.nn.functional as F

from kernel import fused_attention, interpreted, kernel_available

logger = logging.getLogger(__name__)  # silent unless a program shows it, as `sample.py --verbose` does

# ------------------------------------------------------------------------------------------ the reference


def visible(segments, T, S, window=None, positions=None, device=None):
    """What the last T of S positions see, as booleans [B or 1, 1, T, S].

    segments and positions are [B, S] or None. Without segments the mask is causal. The window counts positions, or
    places in the row where positions is None.
    """
    # 1) no later keys: the T queries are the last of the S positions
    j = torch.arange(S, device=device)
    i = j[-T:, None]  # [T, 1]
    seen = j <= i  # [T, S]

    # 2) the prefix and one's own continuation
    if segments is not None:
        query = segments[:, -T:, None]  # [B, T, 1]
        key = segments[:, None, :]  # [B, 1, S]
        prefix = key == 0
        own = (key == query) & (key > 0)
        seen = seen & (prefix | own)  # [B, T, S]

    # 3) nothing before the window
    if window:
        if positions is None:
            positions = j[None]
        query = positions[:, -T:, None]
        key = positions[:, None, :]
        seen = seen & (query - key < window)
    return seen.view(-1, 1, T, S)


def plain_attention(q, k, v, causal, segments, window, positions):
    """`attention` in plain PyTorch: the reference for the fused kernel, and what runs where that cannot."""
    H, T = q.shape[1:3]
    H_kv, S = k.shape[1:3]

    # plain causal attention is a flag in PyTorch. A single query is the newest position: it sees every key and needs
    # neither flag nor mask. Everything else needs a dense mask.
    mask = None
    has_cached_keys = causal and 1 < T < S
    if segments is not None or window or has_cached_keys:
        mask = visible(segments, T, S, window, positions, q.device)
    is_causal = causal and mask is None and T > 1

    is_grouped = H_kv < H
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=is_grouped)


# ------------------------------------------------------------------------------------------ attention


def attention(q, k, v, *, causal=False, segments=None, window=None, positions=None, impl=None):
    """softmax(q kᵀ / √D) v under the mask above.

    q          [B, H, T, D]
    k, v       [B, H_kv, S, D]; H is a multiple of H_kv, and H / H_kv query heads share a key head
    causal     position i sees j <= i
    segments   integers [B, S]: the rule above, which is causal too
    window     causal, and only the last `window` positions are seen
    positions  integers [B, S]: what the window counts. Needed where several continuations follow one prefix; without
               it the window counts places in the row
    impl       "triton" or "torch" overrides the choice between the fused kernel and PyTorch

    Under a mask the queries are the last T of the S positions, so that a prefill can continue after cached keys.
    Returns [B, H, T, D]. A query that sees nothing gets zeros. Raises ValueError if impl="triton" cannot run.
    """
    # 1) a window and segments are causal; a window that is as wide as the row hides nothing
    S = k.shape[2]
    causal = causal or window is not None or segments is not None
    if positions is None and window is not None and window >= S:
        window = None

    # 2) choose what computes it
    if impl is None:
        impl = _choose(q, S, causal, segments, window)
    elif impl == "triton" and not (kernel_available(q.device) or interpreted()):
        raise ValueError(f"the Triton kernel does not run on {q.device}: it needs Triton and a GPU; leave impl out")
    kind = _kind_of_mask(causal, segments, window)
    _log_once(f"attention with {kind} on {q.device.type}, head size {q.shape[3]}: {impl}")

    # 3) compute
    mask = dict(causal=causal, segments=segments, window=window, positions=positions)
    if impl == "triton":
        return fused_attention(q, k, v, **mask)
    return plain_attention(q, k, v, **mask)


def _choose(q, S, causal, segments, window) -> str:
    """PyTorch's own kernels are faster without a mask and for plain causal attention; the fused kernel for the rest.

    For segments, windows and queries after cached keys PyTorch needs a dense mask and cannot skip hidden blocks.
    """
    T, D = q.shape[2:]
    has_cached_keys = causal and T < S
    needs_mask = segments is not None or window is not None or has_cached_keys

    # the kernel's registers hold heads of up to 256 columns; and a single query leaves it nothing to skip
    suits_kernel = needs_mask and T > 1 and D <= 256
    if suits_kernel and kernel_available(q.device):
        return "triton"
    return "torch"


def _kind_of_mask(causal, segments, window) -> str:
    if segments is not None:
        return "segments"
    if window:
        return "a window"
    if causal:
        return "causal"
    return "no mask"


@functools.cache  # each line once, not once per layer and step
def _log_once(line: str):
    logger.info(line)


# ------------------------------------------------------------------------------------------ decoding


class StepMasks(NamedTuple):
    """What a decoding step adds to its scores: 0 where a position is seen, -inf where it is hidden."""

    prefix: torch.Tensor  # [B * H_kv, 1, P]
    suffix: torch.Tensor  # [1, 1, S]


def step_masks(lengths, newest, sizes: tuple[int, int, int], window: int | None, dtype: torch.dtype) -> StepMasks:
    """The masks of one decoding step, the same for all layers with this window.

    lengths  integers [B]: how many positions of the prefix belong to study b
    newest   an integer tensor []: the place of the newest position in every suffix, 0 in the first step
    sizes    H_kv, P and S of `shared_prefix_attention`
    """
    H_kv, P, S = sizes
    prefix_places = torch.arange(P, device=lengths.device)
    suffix_places = torch.arange(S, device=lengths.device)
    prefix_seen = prefix_places < lengths[:, None]  # [B, P]
    suffix_seen = suffix_places <= newest  # [S]
    # With a prefix of 5, the second position of a suffix (newest = 1) and a window of 3, the newest position is
    # 5 + 1 = 6: it sees 4, 5 and 6, so that 6 - 3 = 3 is the last hidden one
    if window is not None:
        last_hidden = newest - window
        prefix_seen &= prefix_places > lengths[:, None] + last_hidden
        suffix_seen &= suffix_places > last_hidden

    def added(seen):
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, float("-inf"))

    prefix = added(prefix_seen)[:, None, None]  # [B, 1, 1, P]
    prefix = prefix.expand(-1, H_kv, 1, P).flatten(0, 1)  # [B * H_kv, 1, P]
    return StepMasks(prefix, added(suffix_seen)[None, None])


def shared_prefix_attention(q, prefix_k, prefix_v, suffix_k, suffix_v, masks: StepMasks):
    """One decoding step of K continuations (beams, samples) of each of B studies.

    q                   [B, H, K, D]: the newest position of each continuation
    prefix_k, prefix_v  [B, H_kv, P, D]: one copy per study, padded on the right
    suffix_k, suffix_v  [B, H_kv, K, S, D]: what each continuation has added, its newest position included, padded
    masks               hide the padding, and what is before the window

    Returns [B, H, K, D]. Each continuation sees its study's prefix and its own suffix under one softmax.

    There is no fused kernel for this, because it would save little: only the scores would not go through memory. For
    the 7B model with 10 continuations of 1,431 positions they are 7 MB of the 435 MB that a layer moves per step, and
    a data-centre GPU's cache holds most of them anyway. (An estimate from tensor sizes, not a measurement.)
    """
    B, H, K, D = q.shape
    H_kv, P = prefix_k.shape[1:3]
    S = suffix_k.shape[3]
    R = H // H_kv  # query heads that share a key head
    scale = D**-0.5
    # the heads that share a key head side by side, for each continuation: then neither product below moves its rows
    q = q.unflatten(1, (H_kv, R)).transpose(2, 3)  # [B, H_kv, K, R, D]

    # 1) scores of the prefix: all heads and continuations that share its keys are the rows of one matrix, so that one
    #    product reads every key once. It scales and masks, too
    rows = q.reshape(B * H_kv, K * R, D)
    prefix_scores = torch.baddbmm(masks.prefix, rows, prefix_k.flatten(0, 1).mT, alpha=scale)  # [B * H_kv, K * R, P]

    # 2) scores of the suffixes: one product for each continuation, whose rows are only the heads
    rows = rows.view(B * H_kv * K, R, D)
    suffix_scores = torch.baddbmm(masks.suffix, rows, suffix_k.flatten(0, 2).mT, alpha=scale)  # [B * H_kv * K, R, S]

    # 3) one softmax over both (PyTorch sums it in float32 and rounds once)
    suffix_scores = suffix_scores.view(B * H_kv, K * R, S)
    weights = torch.cat((prefix_scores, suffix_scores), -1).softmax(-1)  # [B * H_kv, K * R, P + S]

    # 4) sums of the values, with the same rows as above. Hidden positions have weight 0, but 0 · NaN is NaN: the cache
    #    must not hold uninitialised memory
    out = torch.bmm(weights[..., :P], prefix_v.flatten(0, 1))  # [B * H_kv, K * R, D]
    suffix_weights = weights.view(B * H_kv * K, R, P + S)[..., P:]
    out = torch.baddbmm(out.view(B * H_kv * K, R, D), suffix_weights, suffix_v.flatten(0, 2))

    # 5) back to one dimension of heads: [B * H_kv * K, R, D] -> [B, H, K, D]. The heads of a position are side by side
    #    in memory, where the next layer joins them
    out = out.view(B, H_kv, K, R, D).transpose(1, 2)  # [B, K, H_kv, R, D]
    return out.flatten(2, 3).transpose(1, 2)
