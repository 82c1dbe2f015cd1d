"""Attention, one mask language for everything: encoder, connector, training, prefill, decoding.

Every position has a segment number. Position i sees position j when

    j <= i  and  (segment[j] == 0 or segment[j] == segment[i])

Segment 0 is the shared prefix, segments 1, 2, … are continuations that see the prefix and themselves
alone, and segment -1 is padding, which nobody sees. Plain causal attention is the case where every
segment is 0; bidirectional attention (the image encoder, the connector) has no mask at all.

A sliding window narrows what is seen to the last positions, itself included (Mistral: Jiang et al. 2023).

Decoding has the same mask with one continuation per beam or sample: `shared_prefix_attention` reads the
prefix's keys and values once for all of them.
"""

import torch
import torch.nn.functional as F


def attention(q, k, v, *, causal=False, segments=None, window=None):
    """softmax(q kᵀ / √D) v, with grouped-query heads.

    q [B, H, T, D]; k and v [B, H_kv, S, D] with H a multiple of H_kv and S >= T: the T queries are the
    last T of the S positions, so a prefill can go on behind keys that are already there.
    causal: position i sees j <= i. segments (integers, [B, S]): the mask above, which is causal too.
    window: causal, and of what is visible only the last `window` keys are seen, by their place in the row.
    Returns [B, H, T, D]; a query that may see nothing gets zeros.
    """
    T, S = q.shape[2], k.shape[2]
    mask = None
    window = None if window is None or window >= S else window
    if segments is not None:
        mask = _visible(segments, T)
    elif window or (causal and 1 < T < S):
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    if window:
        mask = mask.triu(S - T - window + 1)
    causal = causal and mask is None and T > 1  # a lone newest position sees all keys
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
    )


def _visible(segments, T):
    """segments [B, S] -> boolean mask [B, 1, T, S] of what the last T positions see."""
    S = segments.shape[1]
    query, key = segments[:, S - T :, None], segments[:, None, :]  # [B, T, 1], [B, 1, S]
    shared = (key == 0) | ((key == query) & (key > 0))
    return shared.tril_(S - T)[:, None]  # [B, 1, T, S]


def shared_prefix_attention(q, prefix_k, prefix_v, lengths, suffix_k, suffix_v, window=None):
    """One decoding step of K continuations of each of B studies: one softmax over prefix and own suffix.

    q [B, H, K, D], the newest position of each continuation.
    prefix_k, prefix_v [B, H_kv, P, D]: one copy per study, read once for all its K continuations; only
    the first lengths[b] positions of study b count (lengths: integers, [B]).
    suffix_k, suffix_v [B, K, H_kv, S, D]: what each continuation has added, newest position included.
    window: only the last `window` positions are seen, the newest included.
    Returns [B, H, K, D].
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
    weights = torch.cat((prefix_scores, suffix_scores), -1).float().softmax(-1).to(q.dtype)
    prefix_weights, suffix_weights = weights.split((P, S), -1)
    suffix_weights = suffix_weights.view(B, H_kv, R, K, S).permute(0, 3, 1, 2, 4)  # [B, K, H_kv, R, S]
    suffix_out = (suffix_weights @ suffix_v).permute(0, 2, 3, 1, 4)  # [B, H_kv, R, K, D]
    # padded prefix rows have weight 0, but 0 * uninitialised memory could be NaN: the cache starts as zeros
    prefix_out = (prefix_weights @ prefix_v).view(B, H_kv, R, K, D)
    return (prefix_out + suffix_out).reshape(B, H, K, D)
