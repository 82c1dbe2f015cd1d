"""The fused Triton attention kernel, forward and backward, with the mask of attention.py.

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
import math

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS, Windows: PyTorch computes everything
    triton = tl = None

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


def fused_attention(q, k, v, causal, segments, window, positions):
    """`attention` by the kernel."""
    if torch.is_autocast_enabled(q.device.type):  # as PyTorch does with its own kernels
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    q, k, v = map(_in_rows, (q, k, v))
    # what has no version (made in inference mode) gets one that nothing equals
    versions = tuple(x is not None and (object() if x.is_inference() else x._version) for x in (segments, positions))
    with torch.cuda.device_of(q):  # Triton launches on the current GPU
        mask = _mask(segments, positions, versions, causal, window, q.shape[2], k.shape[2], q.device)
        return _Fused.apply(q, k, v, mask)


def kernel_available(device) -> bool:
    """Whether the kernel runs on a device: Triton is there, and it is a GPU of AMD or, from Ampere on, of NVIDIA."""
    device = torch.device(device)
    if triton is None or device.type != "cuda":
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def interpreted() -> bool:
    """Whether Triton's interpreter computes the kernel, on any device (TRITON_INTERPRET=1)."""
    return triton is not None and triton.knobs.runtime.interpret
