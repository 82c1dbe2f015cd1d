"""Linear layers whose weights are whole numbers of 8 bits, with one scale for each output row.

    W[i, j] ≈ weight[i, j] · weight_scale[i]        weight_scale[i] = greatest |W[i, :]| / 127

Symmetric, rounded to nearest, without calibration. An error of half a scale is about 1 % of a usual weight.

On disk `X.weight` is int8 [rows, columns] and `X.weight_scale` float32 [rows]; config.json has `"mm_weights": "int8"`.
"""

import logging

import torch
import torch.nn.functional as F
from torch import nn

from kernel import kernel_available
from plumbing.int8_kernel import MOST_ROWS, int8_linear

logger = logging.getLogger(__name__)  # silent unless a program shows it, as `sample.py --verbose` does

# numbers that are in memory as float32 at once: on a CPU what its cache holds, else enough for a kernel to be worth it
BLOCKS = {"cpu": 2**18}
OTHER_BLOCK = 2**24
CPU_VECTORS = torch.backends.cpu.get_cpu_capability()  # a constant, because torch.compile cannot ask for it
_has_gpu_kernel = {}  # by device
_messages = set()  # what was logged already


def row_blocks(weight: torch.Tensor) -> list[slice]:
    """Cuts a matrix into blocks of rows, each of BLOCKS numbers at most, or of one row."""
    height, width = weight.shape
    step = max(1, BLOCKS.get(weight.device.type, OTHER_BLOCK) // width)
    return [slice(start, start + step) for start in range(0, height, step)]


@torch.no_grad()
def quantise_into(source: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor):
    """Rounds a matrix [rows, columns] of any float type into int8 `weight` and float32 `scale` [rows], in place.

    NaN or infinity in a row makes its scale one of them.
    """
    for rows in row_blocks(source):
        block = source[rows].to(weight.device, torch.float32)
        # a row of zeros has a scale, too
        scale[rows] = (block.abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
        weight[rows] = (block / scale[rows, None]).round()


def plain_linear(x, weight, scale, bias=None):
    """The layer in plain PyTorch, for every device and type: blocks of rows become numbers of x's type, one by one."""
    parts = []
    for rows in row_blocks(weight):
        block = weight[rows].float() * scale[rows, None]
        parts.append(F.linear(x, block.to(x.dtype)))
    out = torch.cat(parts, -1)
    return out if bias is None else out + bias


# an operator of our own, which torch.compile leaves as it is: Inductor (PyTorch 2.13) fails on the one inside
library = torch.library.Library("nanolibra", "DEF")
library.define("int8_product(Tensor x, Tensor weight) -> Tensor")


@torch.library.impl(library, "int8_product", "CPU")
def int8_product(x, weight):
    """x bfloat16 [B, columns], weight int8 [rows, columns] -> bfloat16 [B, rows]."""
    # the kernel would round the scales to bfloat16: they are applied later
    return torch.ops.aten._weight_int8pack_mm(x, weight, torch.ones(len(weight), dtype=torch.bfloat16))


@torch.library.register_fake("nanolibra::int8_product", lib=library)
def int8_product_shape(x, weight):
    return x.new_empty(len(x), len(weight))


def cpu_linear(x, weight, scale, bias=None):
    """The layer with PyTorch's CPU kernel, which reads the weights as they are; x and its result pass in bfloat16.

    It is the faster one in the prefill, too: 49 ms of 1,400 rows by 2,816 × 1,024 on one core with AVX-512, where the
    plain version takes 77 and float32 72. Each row's result is the same bits whatever rows are beside it.
    """
    rows = x.flatten(0, -2).bfloat16()
    out = torch.ops.nanolibra.int8_product(rows, weight).to(scale.dtype) * scale
    out = out.to(x.dtype).unflatten(0, x.shape[:-1])
    return out if bias is None else out + bias


def _log_once(message: str):
    # nothing can be logged inside a compiled step; on a CPU the prefill has said it
    if not torch.compiler.is_compiling() and message not in _messages:
        _messages.add(message)
        logger.info(message)


def has_cpu_kernel(x) -> bool:
    """Tells whether the kernel's fast version computes x [..., columns]. Without AVX it is slower than float32.

    It reads beyond the ends of rows whose length is no multiple of 16 (wrong numbers or a crash in PyTorch 2.13).
    """
    return x.device.type == "cpu" and x.shape[-1] % 32 == 0 and CPU_VECTORS in ("AVX2", "AVX512")


def has_gpu_kernel(device) -> bool:
    # a dictionary, because torch.compile cannot ask a GPU what it is; the prefill, which is not compiled, has asked
    if device not in _has_gpu_kernel:
        _has_gpu_kernel[device] = kernel_available(device)
    return _has_gpu_kernel[device]


def gpu_linear(x, weight, scale, bias=None):
    """The layer with the Triton kernel, for few rows."""
    out = int8_linear(x.flatten(0, -2), weight, scale).unflatten(0, x.shape[:-1])
    return out if bias is None else out + bias


class Int8Linear(nn.Module):
    """An nn.Linear in 8 bits, for inference."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        source = linear.weight
        weight = torch.empty_like(source, dtype=torch.int8)
        scale = torch.empty(len(source), dtype=torch.float32, device=source.device)
        # a layer without memory gets its weights later
        if not source.is_meta:
            quantise_into(source, weight, scale)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)
        self.bias = linear.bias

    def forward(self, x):
        """x [..., columns] -> [..., rows] in x's type."""
        weights = self.weight, self.weight_scale, self.bias
        if has_cpu_kernel(x):
            _log_once("int8: PyTorch's CPU kernel, activations in bfloat16")
            return cpu_linear(x, *weights)
        if not has_gpu_kernel(x.device):
            _log_once(f"int8: no kernel for this {x.device.type}: slow, weights become {x.dtype} before each product")
            return plain_linear(x, *weights)
        if x.numel() > MOST_ROWS * x.shape[-1]:
            _log_once(f"int8: weights become {x.dtype} before products of more than {MOST_ROWS} rows")
            return plain_linear(x, *weights)
        _log_once(f"int8: Triton kernel for up to {MOST_ROWS} rows")
        return gpu_linear(x, *weights)

    def first_rows(self, x, count: int):
        """The first `count` outputs, from the plain version: logits that bfloat16 rounds would often be equal."""
        return plain_linear(x, self.weight[:count], self.weight_scale[:count])


def quantise_linears(module: nn.Module):
    """Replaces every nn.Linear inside a module, one at a time."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, Int8Linear(child))


def is_int8(module: nn.Module) -> bool:
    return any(isinstance(child, Int8Linear) for child in module.modules())
