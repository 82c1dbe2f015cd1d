"""Fused attention in Triton, forward and backward, under the mask of attention.py.

For one head, with c = log2(e) / √D, and sums over the keys j that query i sees:

    S = c Q Kᵀ      L_i = log2 Σ_j 2^S_ij      P_ij = 2^(S_ij - L_i)      O = P V

Forward is the online softmax (Milakov & Gimelshein 2018) in tiles (FlashAttention-2: Dao 2023). A program holds M
queries and reads the keys N at a time. It keeps the running maximum m of S and the running sum z of 2^(S - m). When m
rises, the sums so far shrink by 2^(m_old - m_new). At the end O = acc / z and L = m + log2 z. Only O and L are written
to memory, never a T × S matrix.

Backward computes P again from L. With Δ_i = Σ_d dO_id O_id:

    dV = Pᵀ dO      dS = P ∘ (dO Vᵀ - Δ)      dQ = dS K / √D      dK = dSᵀ Q / √D

One kernel holds a block of queries and sums dQ over the keys. Another holds a block of keys and sums dK and dV over the
queries. No two programs add to the same number, so gradients are the same in every run.

The mask is one function, `_sees`. A small kernel evaluates it once per step and lists for each block which blocks are
fully visible to it and which are partly visible. The others skip the rest, and mask only what is partly visible.
"""

import functools
import math
from typing import NamedTuple

import torch

try:
    import triton
    import triton.language as tl

    jit, constexpr = triton.jit, tl.constexpr
    LN2 = constexpr(math.log(2))
    constant = functools.cache(constexpr)  # Triton compares arguments in every launch: faster if they are identical
except ImportError:  # Triton does not exist for macOS and Windows: PyTorch computes everything
    triton = tl = constexpr = None
    jit = lambda function: function

# ------------------------------------------------------------------------------------------ masks and memory
# b is a row of the batch, h a head; t are places among the T queries, j places among the S keys.


class Tensor(NamedTuple):
    """A tensor [B, H, T, D]. Strides count rows of D numbers, so that the compiler knows that D divides the addresses.

    Otherwise it would know only whether 16 divides a stride, and could not load 16 bytes at a time from heads of 24.
    """

    pointer: torch.Tensor
    stride_b: int
    stride_h: int
    stride_t: int
    D: int  # a constant of the compiled kernel


class Mask(NamedTuple):
    """Who sees whom in a batch of rows. The T queries are the last of the S positions."""

    table: torch.Tensor  # [B or 1, 2, S]: segments, positions
    stride: int  # of B; 0 if all rows have the same mask
    T: int
    S: int
    ahead: int  # position i sees nothing after i + ahead: 0 is causal
    window: int


class Visits(NamedTuple):
    """For each block of one side, a list of the blocks of the other side that it visits.

    A list is two counts, then the fully visible blocks from the front and the partly visible ones from the back:

        3 2 | 0 1 2 . 5 3        sees blocks 0, 1, 2 fully, 3 and 5 partly, 4 not at all; inner = 6
    """

    lists: torch.Tensor  # [B or 1, outer, 2 + inner]
    stride: int  # of B; 0 if all rows have the same mask
    inner: int  # blocks on the other side


@jit
def _sees(mask, b, t, j):
    """Which queries t [M] see which keys j [N]: [M, N]. Places outside the row neither see nor are seen."""
    segments = mask.table + b * mask.stride
    positions = segments + mask.S
    i = mask.S - mask.T + t  # the place of a query in the row
    # without a mask there may be more queries than keys; then i is negative, and zeros are as good as any number
    exists = (t < mask.T) & (i >= 0)
    query_segment, query_position = tl.load(segments + i, exists, 0), tl.load(positions + i, exists, 0)
    key_segment, key_position = tl.load(segments + j, j < mask.S, -1), tl.load(positions + j, j < mask.S, 0)

    # everybody sees the prefix; a continuation (segment > 0) also sees itself; no key has the segment -2
    own = tl.where(query_segment > 0, query_segment, -2)
    seen = (key_segment == 0)[None, :] | (key_segment[None, :] == own[:, None])
    last = tl.where(t < mask.T, i + mask.ahead, -1)
    before = query_position - mask.window
    return seen & (j[None, :] <= last[:, None]) & (key_position[None, :] > before[:, None])


@jit
def _visits_kernel(lists, mask, inner, M: constexpr, N: constexpr, BY_KEY: constexpr):
    """Writes the list of one block: a block of keys if BY_KEY, else a block of queries. See `Visits`."""
    outer, b = tl.program_id(0), tl.program_id(1)
    row = lists + (b * tl.num_programs(0) + outer) * (inner + 2)
    full, mixed = 0, 0
    for other in range(inner):
        t = (other if BY_KEY else outer) * M
        j = (outer if BY_KEY else other) * N
        pairs = tl.sum(_sees(mask, b, t + tl.arange(0, M), j + tl.arange(0, N)).to(tl.int32))
        # queries after the last one need no mask: they are loaded as zeros and add nothing
        is_full = pairs == tl.minimum(M, mask.T - t) * N
        tl.store(row + tl.where(is_full, 2 + full, 1 + inner - mixed), other, pairs > 0)
        full += is_full.to(tl.int32)
        mixed += ((pairs > 0) & (is_full == 0)).to(tl.int32)
    tl.store(row, full)
    tl.store(row + 1, mixed)


@jit
def _visit_list(visits, b, block, MASKED: constexpr):
    """The list of a block, and where its partly visible (MASKED) or its fully visible blocks begin and end there."""
    row = visits.lists + b * visits.stride + block * (visits.inner + 2)
    begin = visits.inner - tl.load(row + 1) if MASKED else 0
    end = visits.inner if MASKED else tl.load(row)
    return row + 2, begin, end


@jit
def _rows(x, b, h, t, count):
    """Pointers to rows t of a head, [rows, WIDTH], and which of them exist: rows before `count`, columns before D."""
    # WIDTH is the power of two that holds D: a head of 80 is computed as one of 128
    d = tl.arange(0, 16 if x.D < 16 else triton.next_power_of_2(x.D))
    # 64 bits: a large batch has more than 2^31 numbers
    head = x.pointer + (b.to(tl.int64) * x.stride_b + h.to(tl.int64) * x.stride_h) * x.D
    return head + t[:, None] * x.stride_t * x.D + d[None, :], (t < count)[:, None] & (d < x.D)[None, :]


@jit
def load_rows(x, b, h, t, count):
    """Rows t of a head, [rows, WIDTH]. What does not exist is zero."""
    pointers, exists = _rows(x, b, h, t, count)
    return tl.load(pointers, exists, 0.0)


@jit
def store_rows(x, b, h, t, count, values):
    pointers, exists = _rows(x, b, h, t, count)
    tl.store(pointers, values.to(x.pointer.dtype.element_ty), exists)


# ------------------------------------------------------------------------------------------ forward and backward


@jit
def _forward_kernel(q, k, v, out, lse, mask, visits, groups, M: constexpr, N: constexpr, DOT: constexpr):
    """O and L of one block of queries of one head. `groups` query heads share a key head."""
    # 1) load the queries. The last block starts first, because it sees the most keys
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    h, b, T = tl.program_id(1), tl.program_id(2), mask.T
    c: constexpr = q.D**-0.5 / LN2
    t = block * M + tl.arange(0, M)
    Q = load_rows(q, b, h, t, T)  # [M, WIDTH]
    m, z = tl.full([M], float("-inf"), tl.float32), tl.zeros([M], tl.float32)
    acc = tl.zeros(Q.shape, tl.float32)

    # 2) go through the keys: first the fully visible blocks, then the others under the mask
    for MASKED in tl.static_range(2):
        blocks, begin, end = _visit_list(visits, b, block, MASKED)
        for n in range(begin, end):
            j = tl.load(blocks + n) * N + tl.arange(0, N)
            K = load_rows(k, b, h // groups, j, mask.S)  # [N, WIDTH]
            s = tl.dot(Q, K.T, input_precision=DOT) * c  # [M, N]
            if MASKED:
                s = tl.where(_sees(mask, b, t, j), s, float("-inf"))
            top = tl.maximum(m, tl.max(s, 1))
            # a query that has seen nothing so far has top = -inf, and -inf - -inf would be NaN
            base = tl.where(top == float("-inf"), 0.0, top) if MASKED else top
            p, shrink = tl.exp2(s - base[:, None]), tl.exp2(m - base)
            V = load_rows(v, b, h // groups, j, mask.S)
            acc = tl.dot(p.to(V.dtype), V, acc * shrink[:, None], input_precision=DOT)
            m, z = top, z * shrink + tl.sum(p, 1)

    # 3) normalise. A query that sees nothing gets O = 0 and L = inf, which makes P = 0 in the backward kernels
    blind = z == 0
    z = tl.where(blind, 1.0, z)
    store_rows(out, b, h, t, T, acc / z[:, None])
    L = tl.where(blind, float("inf"), m + tl.log2(z))
    tl.store(lse + (b * tl.num_programs(1) + h) * T + t, L, t < T)


@jit
def _dq_kernel(q, k, v, out, grad, lse, deltas, dq, mask, visits, groups, M: constexpr, N: constexpr, DOT: constexpr):
    """dQ of one block of queries of one head. It also computes Δ, which it writes for the next kernel."""
    # 1) load what belongs to the queries: Q, dO (here G), L and Δ
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    h, b, T = tl.program_id(1), tl.program_id(2), mask.T
    c: constexpr = q.D**-0.5 / LN2
    t = block * M + tl.arange(0, M)
    Q, G = load_rows(q, b, h, t, T), load_rows(grad, b, h, t, T)  # [M, WIDTH]
    row = (b * tl.num_programs(1) + h) * T
    L = tl.load(lse + row + t, t < T, 0.0)  # [M]
    delta = tl.sum(G.to(tl.float32) * load_rows(out, b, h, t, T).to(tl.float32), 1)
    tl.store(deltas + row + t, delta, t < T)

    # 2) go through the keys as in the forward kernel, and sum dS K
    acc = tl.zeros(Q.shape, tl.float32)
    for MASKED in tl.static_range(2):
        blocks, begin, end = _visit_list(visits, b, block, MASKED)
        for n in range(begin, end):
            j = tl.load(blocks + n) * N + tl.arange(0, N)
            K, V = load_rows(k, b, h // groups, j, mask.S), load_rows(v, b, h // groups, j, mask.S)  # [N, WIDTH]
            p = tl.exp2(tl.dot(Q, K.T, input_precision=DOT) * c - L[:, None])  # P: [M, N]
            if MASKED:
                p = tl.where(_sees(mask, b, t, j), p, 0.0)
            ds = p * (tl.dot(G, V.T, input_precision=DOT) - delta[:, None])
            acc = tl.dot(ds.to(K.dtype), K, acc, input_precision=DOT)
    store_rows(dq, b, h, t, T, acc * q.D**-0.5)


@jit
def _dkdv_kernel(q, k, v, grad, lse, deltas, dk, dv, mask, visits, groups, M: constexpr, N: constexpr, DOT: constexpr):
    """dK and dV of one block of keys of one key head."""
    # 1) load the keys and values
    block, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    T, S = mask.T, mask.S
    c: constexpr = q.D**-0.5 / LN2
    j = block * N + tl.arange(0, N)
    K, V = load_rows(k, b, h, j, S), load_rows(v, b, h, j, S)  # [N, WIDTH]
    DK, DV = tl.zeros(K.shape, tl.float32), tl.zeros(V.shape, tl.float32)

    # 2) go through the queries that see them, in each query head that reads this key head; S and P are transposed
    for r in range(groups):
        head = h * groups + r
        row = (b * tl.num_programs(1) * groups + head) * T
        for MASKED in tl.static_range(2):
            blocks, begin, end = _visit_list(visits, b, block, MASKED)
            for n in range(begin, end):
                t = tl.load(blocks + n) * M + tl.arange(0, M)
                Q, G = load_rows(q, b, head, t, T), load_rows(grad, b, head, t, T)  # [M, WIDTH]
                L = tl.load(lse + row + t, t < T, 0.0)  # [M]
                delta = tl.load(deltas + row + t, t < T, 0.0)
                p = tl.exp2(tl.dot(K, Q.T, input_precision=DOT) * c - L[None, :])  # Pᵀ: [N, M]
                if MASKED:
                    p = tl.where(_sees(mask, b, t, j).T, p, 0.0)
                DV = tl.dot(p.to(G.dtype), G, DV, input_precision=DOT)
                ds = p * (tl.dot(V, G.T, input_precision=DOT) - delta[None, :])
                DK = tl.dot(ds.to(Q.dtype), Q, DK, input_precision=DOT)
    store_rows(dk, b, h, j, S, DK * q.D**-0.5)
    store_rows(dv, b, h, j, S, DV)


class Tile(NamedTuple):
    own: int  # rows of the block that a program holds
    visited: int  # rows of each block that it visits
    num_warps: int
    num_stages: int  # blocks that are loaded ahead while others are computed


# (GPU, columns that a head may have) -> tiles of the forward kernel and of the backward kernels. They are the largest
# that fit into registers and shared memory: `python -m bench.kernel_proofs` checks it. Shared memory is 99 KB on all
# NVIDIA GPUs from Ampere on, 227 KB on sm_90 and sm_100 ("hopper"), and 64 KB on AMD.
TILES = {
    ("ampere", 32): (Tile(128, 64, 4, 3), Tile(64, 64, 4, 3)),
    ("ampere", 64): (Tile(128, 32, 4, 3), Tile(64, 64, 4, 3)),
    ("ampere", 128): (Tile(128, 32, 8, 3), Tile(64, 32, 8, 2)),
    ("ampere", 256): (Tile(64, 32, 8, 2), Tile(32, 32, 8, 2)),
    ("hopper", 64): (Tile(128, 64, 4, 3), Tile(64, 64, 4, 3)),
    ("hopper", 128): (Tile(128, 64, 8, 3), Tile(64, 64, 8, 2)),
    ("hopper", 256): (Tile(64, 64, 8, 2), Tile(64, 16, 8, 2)),
    ("amd", 64): (Tile(128, 64, 4, 2), Tile(64, 32, 4, 1)),
    ("amd", 128): (Tile(128, 32, 4, 2), Tile(64, 32, 4, 1)),
    ("amd", 256): (Tile(64, 32, 4, 2), Tile(32, 16, 4, 1)),
    ("float32", 32): (Tile(64, 32, 4, 2), Tile(32, 16, 4, 1)),
    ("float32", 64): (Tile(32, 16, 4, 2), Tile(32, 32, 4, 1)),
    ("float32", 128): (Tile(16, 16, 4, 1), Tile(16, 16, 4, 1)),
    ("float32", 256): (Tile(16, 16, 4, 1), Tile(16, 16, 8, 1)),
}


def gpu_kind(device) -> str:
    if torch.version.hip:
        return "amd"
    is_hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] in (9, 10)
    return "hopper" if is_hopper else "ampere"


def tile_for(q, backward) -> tuple[Tile, dict]:
    """The tile for queries [B, H, T, D], and how the kernels are compiled for it."""
    gpu, D = gpu_kind(q.device), q.shape[-1]
    kind = "float32" if q.dtype == torch.float32 else gpu
    columns = min(columns for row, columns in TILES if row == kind and columns >= D)
    tile = TILES[kind, columns][backward]
    dot = "ieee" if gpu == "amd" else "tf32x3"  # NVIDIA's tensor cores compute float32 as three products of TF32
    return tile, dict(DOT=dot, num_warps=tile.num_warps, num_stages=tile.num_stages)


# ------------------------------------------------------------------------------------------ launching
# Every layer of a step passes the same segments and positions. Two caches give it the mask and the lists that the first
# layer made. They recognise a tensor by its identity, and a change in place by the number that PyTorch counts it with.


@functools.lru_cache(maxsize=4)
def make_mask(segments, positions, versions, causal, window, T, S, device) -> Mask:
    if segments is None:
        segments = torch.zeros(1, S, dtype=torch.int32, device=device)
    if positions is None:
        positions = torch.arange(S, dtype=torch.int32, device=device)[None]
    table = torch.stack(torch.broadcast_tensors(segments, positions), 1).int()  # [B or 1, 2, S]
    stride = table.stride(0) if len(table) > 1 else 0
    return Mask(table, stride, T, S, ahead=0 if causal else max(S, T), window=window or 2**31 - 1)


@functools.lru_cache(maxsize=12)
def list_visits(mask, M, N, by_key) -> Visits:
    """Lists for blocks of M queries and N keys: one for each block of queries or, by_key, of keys."""
    queries, keys = math.ceil(mask.T / M), math.ceil(mask.S / N)
    outer, inner = (keys, queries) if by_key else (queries, keys)
    lists = torch.empty(len(mask.table), outer, 2 + inner, dtype=torch.int32, device=mask.table.device)
    _visits_kernel[outer, len(lists)](lists, mask, inner, M=M, N=N, BY_KEY=by_key, num_warps=8)
    return Visits(lists, lists.stride(0) if len(lists) > 1 else 0, inner)


def _dense_rows(x):
    """x, or a copy if its strides are not multiples of D, as `Tensor` needs them."""
    fits = x.stride(-1) == 1 and all(stride % x.shape[-1] == 0 for stride in x.stride()[:3])
    return x if fits else x.contiguous()


def describe(x) -> Tensor:
    D = x.shape[-1]
    strides = (stride // D for stride in x.stride()[:3])
    return Tensor(x, *strides, constant(D))


class FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, mask):
        B, H, T, _ = q.shape
        out = torch.empty_like(q)
        lse = q.new_empty(B, H, T, dtype=torch.float32)
        tile, options = tile_for(q, backward=False)
        _forward_kernel[math.ceil(T / tile.own), H, B](
            q=describe(q), k=describe(k), v=describe(v), out=describe(out), lse=lse,
            mask=mask, visits=list_visits(mask, tile.own, tile.visited, by_key=False),
            groups=H // k.shape[1], M=tile.own, N=tile.visited, **options,
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.mask = mask
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        q, k, v, out, lse = ctx.saved_tensors
        (B, H, T, _), (_, H_kv, S, _) = q.shape, k.shape
        dq, dk, dv, deltas = (torch.empty_like(x) for x in (q, k, v, lse))
        tile, options = tile_for(q, backward=True)
        shared = dict(
            q=describe(q), k=describe(k), v=describe(v), grad=describe(_dense_rows(grad)), lse=lse, deltas=deltas,
            mask=ctx.mask, groups=H // H_kv, **options,
        )  # fmt: skip

        # a program for each block of queries and each query head; it visits keys
        visits = list_visits(ctx.mask, tile.own, tile.visited, by_key=False)
        _dq_kernel[math.ceil(T / tile.own), H, B](
            out=describe(out), dq=describe(dq), visits=visits, M=tile.own, N=tile.visited, **shared
        )
        # a program for each block of keys and each key head; it visits queries
        visits = list_visits(ctx.mask, tile.visited, tile.own, by_key=True)
        _dkdv_kernel[math.ceil(S / tile.own), H_kv, B](
            dk=describe(dk), dv=describe(dv), visits=visits, M=tile.visited, N=tile.own, **shared
        )
        return dq, dk, dv, None


def fused_attention(q, k, v, causal, segments, window, positions):
    """`attention.attention` computed by the kernels, for D <= 256; see there for the arguments."""
    # in autocast the inputs are cast as PyTorch casts those of its own kernels
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    q, k, v = _dense_rows(q), _dense_rows(k), _dense_rows(v)
    # PyTorch does not count the changes of tensors made in inference mode: object() lets them look new in every call
    tensors = [x for x in (segments, positions) if x is not None]
    versions = tuple(object() if x.is_inference() else x._version for x in tensors)
    with torch.cuda.device_of(q):  # Triton launches on the current GPU
        mask = make_mask(segments, positions, versions, causal, window, T=q.shape[2], S=k.shape[2], device=q.device)
        return FusedAttention.apply(q, k, v, mask)


def kernel_available(device) -> bool:
    """Whether the kernels run on a device. They need Triton and an AMD GPU or an NVIDIA GPU from Ampere on."""
    if triton is None or torch.device(device).type != "cuda":
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on any device (TRITON_INTERPRET=1)."""
    return triton is not None and triton.knobs.runtime.interpret
