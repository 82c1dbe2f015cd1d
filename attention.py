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

The kernel
----------
Of one head, with c = log2(e) / √D, the sums over the keys j that query i sees:

    S = c Q Kᵀ      L_i = log2 Σ_j 2^S_ij      P_ij = 2^(S_ij - L_i)      O = P V

Forward (online softmax: Milakov & Gimelshein 2018; in tiles: Dao 2023, FlashAttention-2): a program has M queries
and goes through the keys N at a time, with the running maximum m of S and the running sum z of 2^(S - m); where m
rises, what was summed shrinks by 2^(m_old - m_new). At the end O = acc / z and L = m + log2 z. No T × S matrix is
ever in memory: only O and L are kept.

Backward: P comes back from L, and with Δ_i = Σ_d dO_id O_id

    dV = Pᵀ dO      dS = P ∘ (dO Vᵀ - Δ)      dQ = dS K / √D      dK = dSᵀ Q / √D

One kernel has a block of queries and sums dQ over keys; another has a block of keys and sums dK and dV over queries and
over the query heads of their key head. No two programs add to one number: gradients are the same in every run.

The mask is one function, `_sees`. A small kernel asks it about every pair, once for all heads, and lists for each block
the blocks with which it has a visible pair, those where every pair is visible apart. The other kernels go through that
list: they skip exactly what is empty, and mask only what is mixed. The list serves every layer of a step. Of a causal
row about half of all blocks are empty; of the continuations behind a shared prefix all but those of each with itself.
"""

import functools
import logging
import math

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS, Windows: PyTorch computes everything
    triton = tl = None

logger = logging.getLogger(__name__)  # a library does not know its program's flags: `sample.py --verbose` shows this

# ------------------------------------------------------------------------------------------ kernels
# Tensors, masks and lists of visits are tuples, made by `_strided`, `_mask` and `_visits`. t are places among the
# queries, j among the keys, h is a head, b a row.

jit, constexpr = (triton.jit, tl.constexpr) if triton else (lambda function: function, None)


@jit
def _sees(mask, b, t, j):
    """The mask of queries t [M] and keys j [N] of row b: [M, N]. What is outside the row neither sees nor is seen."""
    table, stride, T, S, ahead, window = mask
    row = table + b * stride
    i = S - T + t  # the queries are the last of the row
    exists = (t < T) & (i >= 0)  # without a mask there may be more queries than keys; then all of this is 0
    own, place = tl.load(row + i, exists, 0), tl.load(row + S + i, exists, 0)
    segment, position = tl.load(row + j, j < S, -1), tl.load(row + S + j, j < S, 0)
    own = tl.where(own > 0, own, -2)  # what is not in a continuation has none of its own to see
    last = tl.where(t < T, i + ahead, -1)
    seen = (segment == 0)[None, :] | (segment[None, :] == own[:, None])
    return seen & (j[None, :] <= last[:, None]) & (position[None, :] > (place - window)[:, None])


@jit
def _visits_kernel(visits, mask, inner, M: constexpr, N: constexpr, BY_KEY: constexpr):
    """For one block (of keys: BY_KEY, else of queries) list the blocks of the other side that it has to do with.

    Its row of visits: the number of blocks where all is visible and where some is; then `inner` places, which hold the
    former from the front and the latter from the back.
    """
    outer, b = tl.program_id(0), tl.program_id(1)
    row = visits + (b * tl.num_programs(0) + outer) * (inner + 2)
    full, mixed = 0, 0
    for other in range(inner):
        t = (other if BY_KEY else outer) * M
        j = (outer if BY_KEY else other) * N + tl.arange(0, N)
        pairs = tl.sum(_sees(mask, b, t + tl.arange(0, M), j).to(tl.int32))
        # behind the last query a block may go on: what is loaded there is zeros, and gives nothing
        whole = pairs == tl.minimum(M, mask[2] - t) * N
        tl.store(row + tl.where(whole, 2 + full, 1 + inner - mixed), other, pairs > 0)
        full += whole.to(tl.int32)
        mixed += ((pairs > 0) & (whole == 0)).to(tl.int32)
    tl.store(row, full)
    tl.store(row + 1, mixed)


@jit
def _list(visits, b, block):
    """Of one block: its list, where the blocks without a mask end in it, and where those with one begin and end."""
    pointer, stride, inner = visits
    row = pointer + b * stride + block * (inner + 2)
    return row + 2, tl.load(row), inner - tl.load(row + 1), inner


@jit
def _rows(x, b, h, t, D: constexpr, WIDTH: constexpr):
    """Pointers [rows, WIDTH] to rows t of head h, and which of the columns are there: a head of 80 is padded to 128."""
    pointer, stride_b, stride_h, stride_t = x
    d = tl.arange(0, WIDTH)
    base = pointer + (b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h) * D
    return base + t[:, None] * stride_t * D + d[None, :], (d < D)[None, :]


@jit
def _load(x, b, h, t, count, D: constexpr, WIDTH: constexpr):
    """Rows t of head h, [rows, WIDTH]; zeros outside."""
    pointers, there = _rows(x, b, h, t, D, WIDTH)
    return tl.load(pointers, (t < count)[:, None] & there, 0.0)


@jit
def _store(x, b, h, t, count, values, D: constexpr, WIDTH: constexpr):
    pointers, there = _rows(x, b, h, t, D, WIDTH)
    tl.store(pointers, values.to(x[0].dtype.element_ty), (t < count)[:, None] & there)


@jit
def _forward_blocks(
    acc, m, z, Q, k, v, mask, b, h, t, c, blocks, begin, end,
    D: constexpr, WIDTH: constexpr, N: constexpr, DOT: constexpr, MASKED: constexpr,
):  # fmt: skip
    """Go on through the keys of the listed blocks: acc [M, WIDTH], m and z [M], as at the top."""
    S = mask[3]
    for n in range(begin, end):
        j = tl.load(blocks + n) * N + tl.arange(0, N)
        s = tl.dot(Q, tl.trans(_load(k, b, h, j, S, D, WIDTH)), input_precision=DOT) * c  # [M, N]
        if MASKED:
            s = tl.where(_sees(mask, b, t, j), s, float("-inf"))
        top = tl.maximum(m, tl.max(s, 1))
        base = tl.where(top == float("-inf"), 0.0, top) if MASKED else top  # nothing seen so far: -inf - -inf is NaN
        p, shrink = tl.exp2(s - base[:, None]), tl.exp2(m - base)
        V = _load(v, b, h, j, S, D, WIDTH)
        acc = tl.dot(p.to(V.dtype), V, acc * shrink[:, None], input_precision=DOT)
        m, z = top, z * shrink + tl.sum(p, 1)
    return acc, m, z


@jit
def _forward_kernel(
    q, k, v, out, lse, mask, visits, R, c,
    D: constexpr, WIDTH: constexpr, M: constexpr, N: constexpr, DOT: constexpr,
):  # fmt: skip
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the last queries have the most keys: longest work first
    h, b, T = tl.program_id(1), tl.program_id(2), mask[2]
    t = block * M + tl.arange(0, M)
    Q = _load(q, b, h, t, T, D, WIDTH)
    m, z = tl.full([M], float("-inf"), tl.float32), tl.zeros([M], tl.float32)
    acc = tl.zeros([M, WIDTH], tl.float32)
    blocks, full, mixed, end = _list(visits, b, block)
    acc, m, z = _forward_blocks(acc, m, z, Q, k, v, mask, b, h // R, t, c, blocks, 0, full, D, WIDTH, N, DOT, False)
    acc, m, z = _forward_blocks(acc, m, z, Q, k, v, mask, b, h // R, t, c, blocks, mixed, end, D, WIDTH, N, DOT, True)
    blind = z == 0  # sees nothing: O = 0, and backward P = 2^(S - inf) = 0
    z = tl.where(blind, 1.0, z)
    _store(out, b, h, t, T, acc / z[:, None], D, WIDTH)
    row = lse + (b * tl.num_programs(1) + h) * T
    tl.store(row + t, tl.where(blind, float("inf"), m + tl.log2(z)), t < T)


@jit
def _dq_blocks(
    acc, Q, G, L, delta, k, v, mask, b, h, t, c, blocks, begin, end,
    D: constexpr, WIDTH: constexpr, N: constexpr, DOT: constexpr, MASKED: constexpr,
):  # fmt: skip
    S = mask[3]
    for n in range(begin, end):
        j = tl.load(blocks + n) * N + tl.arange(0, N)
        K, V = _load(k, b, h, j, S, D, WIDTH), _load(v, b, h, j, S, D, WIDTH)
        p = tl.exp2(tl.dot(Q, tl.trans(K), input_precision=DOT) * c - L[:, None])  # [M, N]
        if MASKED:
            p = tl.where(_sees(mask, b, t, j), p, 0.0)
        ds = p * (tl.dot(G, tl.trans(V), input_precision=DOT) - delta[:, None])
        acc = tl.dot(ds.to(K.dtype), K, acc, input_precision=DOT)
    return acc


@jit
def _dq_kernel(
    q, k, v, out, grad, lse, deltas, dq, mask, visits, R, c, scale,
    D: constexpr, WIDTH: constexpr, M: constexpr, N: constexpr, DOT: constexpr,
):  # fmt: skip
    """dQ of one block of queries; on the way Δ, which the next kernel reads."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    h, b, T = tl.program_id(1), tl.program_id(2), mask[2]
    t = block * M + tl.arange(0, M)
    Q, G = _load(q, b, h, t, T, D, WIDTH), _load(grad, b, h, t, T, D, WIDTH)
    delta = tl.sum(G.to(tl.float32) * _load(out, b, h, t, T, D, WIDTH).to(tl.float32), 1)
    row = (b * tl.num_programs(1) + h) * T
    tl.store(deltas + row + t, delta, t < T)
    L = tl.load(lse + row + t, t < T, 0.0)
    acc = tl.zeros([M, WIDTH], tl.float32)
    blocks, full, mixed, end = _list(visits, b, block)
    acc = _dq_blocks(acc, Q, G, L, delta, k, v, mask, b, h // R, t, c, blocks, 0, full, D, WIDTH, N, DOT, False)
    acc = _dq_blocks(acc, Q, G, L, delta, k, v, mask, b, h // R, t, c, blocks, mixed, end, D, WIDTH, N, DOT, True)
    _store(dq, b, h, t, T, acc * scale, D, WIDTH)


@jit
def _dkdv_blocks(
    dk, dv, K, V, q, grad, lse, deltas, mask, b, h, j, c, blocks, begin, end,
    D: constexpr, WIDTH: constexpr, M: constexpr, DOT: constexpr, MASKED: constexpr,
):  # fmt: skip
    T = mask[2]
    for n in range(begin, end):
        t = tl.load(blocks + n) * M + tl.arange(0, M)
        Q, G = _load(q, b, h, t, T, D, WIDTH), _load(grad, b, h, t, T, D, WIDTH)
        L, delta = tl.load(lse + t, t < T, 0.0), tl.load(deltas + t, t < T, 0.0)
        p = tl.exp2(tl.dot(K, tl.trans(Q), input_precision=DOT) * c - L[None, :])  # Pᵀ, [N, M]
        if MASKED:
            p = tl.where(tl.trans(_sees(mask, b, t, j)), p, 0.0)
        dv = tl.dot(p.to(G.dtype), G, dv, input_precision=DOT)
        ds = p * (tl.dot(V, tl.trans(G), input_precision=DOT) - delta[None, :])
        dk = tl.dot(ds.to(Q.dtype), Q, dk, input_precision=DOT)
    return dk, dv


@jit
def _dkdv_kernel(
    q, k, v, grad, lse, deltas, dk, dv, mask, visits, R, c, scale,
    D: constexpr, WIDTH: constexpr, M: constexpr, N: constexpr, DOT: constexpr,
):  # fmt: skip
    """dK and dV of one block of keys: over the blocks of queries that see it, in each of the R query heads."""
    block, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    T, S = mask[2], mask[3]
    j = block * N + tl.arange(0, N)
    K, V = _load(k, b, h, j, S, D, WIDTH), _load(v, b, h, j, S, D, WIDTH)
    DK, DV = tl.zeros([N, WIDTH], tl.float32), tl.zeros([N, WIDTH], tl.float32)
    blocks, full, mixed, end = _list(visits, b, block)
    for r in range(R):
        head = h * R + r
        row = (b * tl.num_programs(1) * R + head) * T
        L, delta = lse + row, deltas + row
        DK, DV = _dkdv_blocks(DK, DV, K, V, q, grad, L, delta, mask, b, head, j, c, blocks, 0, full,
                              D, WIDTH, M, DOT, False)  # fmt: skip
        DK, DV = _dkdv_blocks(DK, DV, K, V, q, grad, L, delta, mask, b, head, j, c, blocks, mixed, end,
                              D, WIDTH, M, DOT, True)  # fmt: skip
    _store(dk, b, h, j, S, DK * scale, D, WIDTH)
    _store(dv, b, h, j, S, DV, D, WIDTH)


# ------------------------------------------------------------------------------------------ launching

# Columns of a padded head -> of the forward and of the backward kernels: rows of a program's own block, rows of the
# blocks that it visits, warps, stages of loads under way. The largest blocks that keep everything in registers and fit
# the shared memory: tests/kernel_compile.py shows that they do.
_SMALL = ((128, 64, 4, 3), (64, 64, 4, 3))
_SINGLE = ((64, 32, 4, 2), (32, 16, 4, 1))
_AMD = ((128, 64, 4, 2), (64, 32, 4, 1))
TILES = {
    "ampere": {16: _SMALL, 32: _SMALL, 64: ((128, 32, 4, 3), (64, 64, 4, 3)), 128: ((128, 32, 8, 3), (64, 32, 8, 2)),
               256: ((64, 32, 8, 2), (32, 32, 8, 2))},
    "hopper": {16: _SMALL, 32: _SMALL, 64: _SMALL, 128: ((128, 64, 8, 3), (64, 64, 8, 2)),
               256: ((64, 64, 8, 2), (64, 16, 8, 2))},
    "amd": {16: _AMD, 32: _AMD, 64: _AMD, 128: ((128, 32, 4, 2), (64, 32, 4, 1)),
            256: ((64, 32, 4, 2), (32, 16, 4, 1))},
    "float32": {16: _SINGLE, 32: _SINGLE, 64: ((32, 16, 4, 2), (32, 32, 4, 1)), 128: ((16, 16, 4, 1), (16, 16, 4, 1)),
                256: ((16, 16, 4, 1), (16, 16, 8, 1))},
}  # fmt: skip


def _target(device) -> str:
    """Whose row of the table a GPU takes, by its shared memory and by how its tensor cores read.

    hopper: 227 KB, operands from shared memory (sm_90, sm_100). ampere: the 99 KB that every other NVIDIA GPU has
    (sm_80 to sm_89, sm_120). amd: 64 KB, warps of 64.
    """
    if torch.version.hip:
        return "amd"
    return "hopper" if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] in (9, 10) else "ampere"


def _tile(q, backward):
    """What the table says: rows of the own and of the visited block, and what else the kernels are compiled for."""
    target, D = _target(q.device), q.shape[-1]
    width = max(16, triton.next_power_of_2(D))
    own, visited, warps, stages = TILES["float32" if q.dtype == torch.float32 else target][width][backward]
    # float32 on NVIDIA's tensor cores is three products of TF32; AMD's matrix cores take it as it is
    dot = "ieee" if target == "amd" else "tf32x3"
    return own, visited, dict(D=D, WIDTH=width, DOT=dot, num_warps=warps, num_stages=stages)


def _strided(x):
    """A tensor [B, H, T, D] as the kernels read it: itself and its strides over B, H and T, in rows of D numbers.

    The compiler is told of a number that 16 divides it, and of no other divisor: of heads of 24 it would not know that
    they can be loaded 16 bytes at a time. That strides are multiples of D tells it.
    """
    return x, *(stride // x.shape[-1] for stride in x.stride()[:3])


def _in_rows(x):
    """x, or a copy where its heads do not lie in rows of D numbers."""
    whole = x.stride(-1) == 1 and all(stride % x.shape[-1] == 0 for stride in x.stride()[:3])
    return x if whole else x.contiguous()


@functools.lru_cache(maxsize=4)
def _mask(segments, positions, versions, causal, window, T, S, device):
    """A mask as the kernels read it: (segments and positions [B or 1, 2, S], its stride over B, T, S, ahead, window).

    Position j is seen from place i when j <= i + ahead: ahead = 0 is causal, S no limit.
    Remembered by the tensors themselves (a tensor equals itself alone) and their versions, which rise when they change.
    """
    B = 1 if segments is None and positions is None else len(segments if positions is None else positions)
    table = torch.zeros(B, 2, S, dtype=torch.int32, device=device)
    if segments is not None:
        table[:, 0] = segments
    table[:, 1] = torch.arange(S, device=device) if positions is None else positions
    return table, 2 * S * (B > 1), T, S, 0 if causal else max(S, T), window or 2**31 - 1


@functools.lru_cache(maxsize=12)
def _visits(mask, M, N, by_key):
    """(list of blocks that see each other, its stride over B, blocks on the other side); see `_visits_kernel`."""
    table, _, T, S, *_ = mask
    outer, inner = -(-T // M), -(-S // N)
    if by_key:
        outer, inner = inner, outer
    B = len(table)
    visits = torch.empty(B, outer, inner + 2, dtype=torch.int32, device=table.device)
    _visits_kernel[outer, B](visits, mask, inner, M=M, N=N, BY_KEY=by_key, num_warps=8)
    return visits, visits.stride(0) * (B > 1), inner


def _forward(q, k, v, mask):
    """-> out [B, H, T, D] as q lies in memory, and the base-2 log-sum-exp [B, H, T]: +inf where nothing is seen."""
    (B, H, T, D), H_kv = q.shape, k.shape[1]
    out, lse = torch.empty_like(q), torch.empty(B, H, T, dtype=torch.float32, device=q.device)
    M, N, options = _tile(q, backward=False)
    tensors = (_strided(x) for x in (q, k, v, out))
    _forward_kernel[-(-T // M), H, B](
        *tensors, lse, mask, _visits(mask, M, N, False), H // H_kv, D**-0.5 / math.log(2),
        M=M, N=N, **options,
    )  # fmt: skip
    return out, lse


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, mask):
        out, lse = _forward(q, k, v, mask)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.mask = mask
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        q, k, v, out, lse = ctx.saved_tensors
        (B, H, T, D), (H_kv, S) = q.shape, k.shape[1:3]
        dq, dk, dv, deltas = (torch.empty_like(x) for x in (q, k, v, lse))
        own, visited, options = _tile(q, backward=True)
        rest = H // H_kv, D**-0.5 / math.log(2), D**-0.5
        q, k, v, out, grad, *gradients = (_strided(x) for x in (q, k, v, out, _in_rows(grad), dq, dk, dv))
        _dq_kernel[-(-T // own), H, B](
            q, k, v, out, grad, lse, deltas, gradients[0], ctx.mask, _visits(ctx.mask, own, visited, False), *rest,
            M=own, N=visited, **options,
        )  # fmt: skip
        _dkdv_kernel[-(-S // own), H_kv, B](
            q, k, v, grad, lse, deltas, *gradients[1:], ctx.mask, _visits(ctx.mask, visited, own, True), *rest,
            M=visited, N=own, **options,
        )  # fmt: skip
        return dq, dk, dv, None


def _fused(q, k, v, causal, segments, window, positions):
    """`attention` by the kernel."""
    if torch.is_autocast_enabled(q.device.type):  # as PyTorch does with its own kernels
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    q, k, v = map(_in_rows, (q, k, v))
    # what has no version (made in inference mode) gets one that nothing equals
    versions = tuple(x is not None and (object() if x.is_inference() else x._version) for x in (segments, positions))
    with torch.cuda.device_of(q):  # Triton launches on the current GPU
        mask = _mask(segments, positions, versions, causal, window, q.shape[2], k.shape[2], q.device)
        return _Fused.apply(q, k, v, mask)


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


def kernel_available(device) -> bool:
    """Whether the kernel runs on a device: Triton is there, and it is a GPU of AMD or, from Ampere on, of NVIDIA."""
    device = torch.device(device)
    if triton is None or device.type != "cuda":
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def _choose(q, S, causal, segments, window) -> str:
    """What computes it. PyTorch's kernels are the better choice for what they know: no mask, and plain causal.

    For segments, windows and queries behind earlier keys they want a dense mask, T × S, and skip nothing.
    """
    T, D = q.shape[2:]
    dense = segments is not None or window is not None or (causal and T < S)
    return "triton" if dense and T > 1 and D <= 256 and kernel_available(q.device) else "torch"


@functools.cache  # each line once
def _say(line: str):
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
    if impl == "triton" and not (kernel_available(q.device) or (triton and triton.knobs.runtime.interpret)):
        raise ValueError(f"the Triton kernel does not run on {q.device}: it needs Triton and a GPU; leave impl out")
    kind = "segments" if segments is not None else "a window" if window else "causal" if causal else "no mask"
    _say(f"attention with {kind} on {q.device.type}, head size {q.shape[-1]}: {chosen}")
    return (_fused if chosen == "triton" else _plain)(q, k, v, causal, segments, window, positions)


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
