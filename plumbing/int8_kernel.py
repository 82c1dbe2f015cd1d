"""The product of few rows with int8 weights in Triton: a decoding step on a GPU.

    out[r, n] = scale[n] · Σ_k x[r, k] · weight[n, k]

Such a step takes as long as reading its weights does. A program holds N rows of the weights. It reads them as 8 bits,
K columns at a time, and makes them 16-bit numbers in registers, which is exact. Tensor cores multiply these with x and
sum in float32. The scale of each row is applied at the end.
"""

from typing import NamedTuple

import torch

from kernel import constexpr, jit, tl, triton

# An A100 does 312e12 / 2 multiplications and reads 2e12 bytes a second: up to 78 rows, reading decides. To expand a
# weight costs at least 5 bytes instead of 1 (read 1, write 2, read 2), so that the kernel is worth it for some more
# rows, such as those of 16 studies with 10 beams. These limits are computed: no GPU has measured them.
MOST_ROWS = 256


class Tile(NamedTuple):
    """Blocks of few weights: the matrices of a layer must keep every multiprocessor busy (4096 / 32 = 128)."""

    rows: int  # of x
    N: int  # rows of the weights
    K: int  # columns


def tile_for(x) -> Tile:
    """`python -m bench.kernel_proofs` checks that every tile fits into registers and shared memory of every GPU."""
    if len(x) <= 16:
        return Tile(16, 32, 256)
    return Tile(64, 32, 256 // x.element_size())


def dot_type(x):
    """16-bit types hold whole numbers of 8 bits exactly. A float32 x is rounded, as it is on a CPU."""
    return tl.float16 if x.dtype == torch.float16 else tl.bfloat16


@jit
def _int8_kernel(x, weight, scale, out, rows, height, width, R: constexpr, N: constexpr, K: constexpr, DOT: constexpr):
    """out [R, N] of one block of rows of x [rows, width] and one of weight [height, width]."""
    # neighbours in the order of programs read the same weights, which the second finds in the cache
    r = tl.program_id(0) * R + tl.arange(0, R)
    n = tl.program_id(1) * N + tl.arange(0, N)
    acc = tl.zeros([N, R], tl.float32)
    # 64 bits: a matrix may have more than 2^31 numbers
    weight_rows = weight + n.to(tl.int64)[:, None] * width
    x_rows = x + r[:, None] * width
    for start in range(0, width, K):
        k = start + tl.arange(0, K)
        in_row = (k < width)[None, :]
        W = tl.load(weight_rows + k[None, :], (n < height)[:, None] & in_row, 0)  # [N, K]
        X = tl.load(x_rows + k[None, :], (r < rows)[:, None] & in_row, 0.0)  # [R, K]
        acc = tl.dot(W.to(DOT), X.to(DOT).T, acc)
    acc *= tl.load(scale + n, n < height, 0.0)[:, None]
    pointers = out + r[None, :] * height + n[:, None]
    tl.store(pointers, acc.to(out.dtype.element_ty), (r < rows)[None, :] & (n < height)[:, None])


def int8_linear(x, weight, scale):
    """x [rows, width], weight int8 [height, width], scale float32 [height] -> [rows, height] in x's type."""
    x, (height, width) = x.contiguous(), weight.shape
    out = x.new_empty(len(x), height)
    tile = tile_for(x)
    # Triton launches on the current GPU; -1, for a CPU in the interpreter, changes nothing
    with torch.cuda.device(x.get_device()):
        _int8_kernel[triton.cdiv(len(x), tile.rows), triton.cdiv(height, tile.N)](
            x, weight, scale, out, len(x), height, width,
            R=tile.rows, N=tile.N, K=tile.K, DOT=dot_type(x), num_warps=4, num_stages=3,
        )  # fmt: skip
    return out
