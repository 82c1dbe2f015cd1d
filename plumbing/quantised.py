"""Linear layers whose weights are whole numbers of 8 or 4 bits. Both are rounded without calibration.

int8: one scale for each output row, symmetric. An error of half a scale is about 1 % of a usual weight.

    W[i, j] ≈ weight[i, j] · weight_scale[i]        weight_scale[i] = greatest |W[i, :]| / 127

int4: a scale and a zero for each group of 32 columns of a row, which a search finds. The logits' layer, and layers
whose columns are no multiple of 32, have 8 bits.

    W[i, j] ≈ (n[i, j] - 8) · scale + zero          n = 0 … 15; scale, zero = weight_scale[i, j // 32]

On disk, with `"mm_weights": "int8"` or `"int4"` in config.json:

    int8   X.weight  int8 [rows, columns]         X.weight_scale  float32 [rows]
    int4   X.weight  uint8 [rows, columns / 2]    X.weight_scale  bfloat16 [rows, columns / 32, 2]

A byte of 4-bit numbers holds n[i, 2k] + 16 · n[i, 2k + 1].
"""

import logging

import torch
import torch.nn.functional as F
from torch import nn

from kernel import kernel_available
from plumbing.int8_kernel import MOST_ROWS, int8_linear

GROUP = 32  # columns, of 4-bit numbers with the same scale and zero
ROUNDS = 5  # of the search for these two
TILE = 64  # rows that the CPU kernel takes at once
TINY = torch.finfo(torch.float32).tiny  # a scale of zeros

logger = logging.getLogger(__name__)  # silent unless a program shows it, as `sample.py --verbose` does

# numbers that are in memory as float32 at once: on a CPU what its cache holds, else enough for a kernel to be worth it
BLOCKS = {"cpu": 2**18}
OTHER_BLOCK = 2**24
CPU_VECTORS = torch.backends.cpu.get_cpu_capability()  # a constant, because torch.compile cannot ask for it
_has_gpu_kernel = {}  # by device
_messages = set()  # what was logged already


# ------------------------------------------------------------------------------------------ rounding


def row_blocks(height: int, width: int, device: torch.device) -> list[slice]:
    """Cuts a matrix into blocks of rows, each of BLOCKS numbers at most, or of one row."""
    step = max(1, BLOCKS.get(device.type, OTHER_BLOCK) // width)
    return [slice(start, start + step) for start in range(0, height, step)]


@torch.no_grad()
def quantise_into(source: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor):
    """Rounds a matrix [rows, columns] of any float type into `weight` and `scale`, in place; see above for both.

    NaN or infinity in a row makes a scale of its one of them.
    """
    for rows in row_blocks(*source.shape, weight.device):
        block = source[rows].to(weight.device, torch.float32)
        if weight.dtype == torch.int8:
            # a row of zeros has a scale, too
            scale[rows] = (block.abs().amax(1) / 127).clamp(min=TINY)
            weight[rows] = (block / scale[rows, None]).round()
        else:
            groups = block.unflatten(1, (-1, GROUP))
            scale[rows] = _search_scale(groups)
            weight[rows] = to_bytes(_steps(groups, scale[rows].float()).add(8).to(torch.uint8).flatten(1))


def _steps(groups, scale):
    """groups [..., GROUP], scale and zero [..., 2] -> the nearest of the 16 steps, -8 to 7."""
    scale, zero = scale[..., None].unbind(-2)
    return ((groups - zero) / scale).round().clamp(-8, 7)


def _search_scale(groups):
    """groups [..., GROUP] -> scale and zero of each, bfloat16 [..., 2].

    First the 16 steps span the group's range. Then two moves take turns, neither of which makes the squared error
    larger: the nearest step for each number, and the line of least squares through numbers and steps.
    """
    low, high = torch.aminmax(groups, dim=-1)
    scale = ((high - low) / 15).clamp(min=TINY)
    line = torch.stack((scale, (high + low + scale) / 2), -1)  # [..., 2]
    for _ in range(ROUNDS):
        steps = _steps(groups, line)
        middle = steps.mean(-1, keepdim=True)
        spread = (steps - middle).square().sum(-1)
        slope = ((steps - middle) * groups).sum(-1) / spread
        # equal steps have no slope
        scale = torch.where(spread > 0, slope, line[..., 0]).clamp(min=TINY)
        line = torch.stack((scale, groups.mean(-1) - scale * middle[..., 0]), -1)
    return line.bfloat16()


def to_bytes(numbers):
    """Numbers of 4 bits, uint8 [rows, columns] -> two in each byte [rows, columns / 2]."""
    return numbers[:, ::2] | numbers[:, 1::2] << 4


def from_bytes(weight):
    return torch.stack((weight & 15, weight >> 4), -1).flatten(1)


def expand(weight, scale):
    """Weights and scales as they are on disk -> float32 [rows, columns]."""
    if weight.dtype == torch.int8:
        return weight.float() * scale[:, None]
    steps = from_bytes(weight).float().unflatten(1, (-1, GROUP)) - 8
    return (steps * scale[..., :1].float() + scale[..., 1:].float()).flatten(1)


# ------------------------------------------------------------------------------------------ computing


def plain_linear(x, weight, scale, bias=None):
    """The layer in plain PyTorch, for every device and type: blocks of rows become numbers of x's type, one by one."""
    parts = []
    for rows in row_blocks(len(weight), x.shape[-1], weight.device):
        block = expand(weight[rows], scale[rows])
        parts.append(F.linear(x, block.to(x.dtype)))
    out = torch.cat(parts, -1)
    return out if bias is None else out + bias


# operators of our own, which torch.compile leaves as they are: Inductor (PyTorch 2.13) fails on the one inside
library = torch.library.Library("nanolibra", "DEF")
library.define("int8_product(Tensor x, Tensor weight) -> Tensor")
library.define("int4_product(Tensor x, Tensor weight, Tensor scale) -> Tensor")


@torch.library.impl(library, "int8_product", "CPU")
def int8_product(x, weight):
    """x bfloat16 [B, columns], weight int8 [rows, columns] -> bfloat16 [B, rows]."""
    # the kernel would round the scales to bfloat16: they are applied later
    return torch.ops.aten._weight_int8pack_mm(x, weight, torch.ones(len(weight), dtype=torch.bfloat16))


@torch.library.impl(library, "int4_product", "CPU")
def int4_product(x, weight, scale):
    """x bfloat16 [B, columns], weight and scale in the layout of `Int4Linear.pack` -> bfloat16 [B, rows]."""
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x, weight, GROUP, scale)


@torch.library.register_fake("nanolibra::int8_product", lib=library)
@torch.library.register_fake("nanolibra::int4_product", lib=library)
def product_shape(x, weight, scale=None):
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


class Int4Linear(nn.Module):
    """An nn.Linear in 4 bits, for inference.

    PyTorch's CPU kernel wants a layout of its own. Weights are kept in it, not beside it, where the kernel runs.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        source = linear.weight
        height, width = source.shape
        weight = torch.empty(height, width // 2, dtype=torch.uint8, device=source.device)
        scale = torch.empty(height, width // GROUP, 2, dtype=torch.bfloat16, device=source.device)
        if not source.is_meta:
            quantise_into(source, weight, scale)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)
        self.bias = linear.bias
        self.is_packed = False
        self.pack()

    def forward(self, x):
        """x [..., columns] -> [..., rows] in x's type."""
        if not self.is_packed:
            place = f"this {x.device.type}"
            # of a layer, not of the device
            if len(self.weight) % TILE:
                place = f"{len(self.weight)} rows"
            _log_once(f"int4: no kernel for {place}: slow, weights become {x.dtype} before each product")
            return plain_linear(x, self.weight, self.weight_scale, self.bias)
        _log_once("int4: PyTorch's CPU kernel, activations in bfloat16")
        rows = x.flatten(0, -2).bfloat16()
        out = torch.ops.nanolibra.int4_product(rows, self.weight, self.weight_scale)
        out = out.to(x.dtype).unflatten(0, x.shape[:-1])
        return out if self.bias is None else out + self.bias

    def pack(self):
        """Puts the weights, as on disk, into the layout of the CPU kernel, if it takes them.

            tiles of 64 rows (AVX2: 32): byte [k, j, d] holds column k of rows 16 j + d, and 32 (16) rows below that
            scales [columns / 32, rows, 2]
        """
        height = len(self.weight)
        if self.is_packed or self.weight.device.type != "cpu" or height % TILE or CPU_VECTORS not in ("AVX2", "AVX512"):
            return
        # in place, since both layouts have as many bytes; new memory would leave gaps where the old one was
        for tile in self.weight.data.split(TILE):
            tile.copy_(torch.ops.aten._convert_weight_to_int4pack_for_cpu(from_bytes(tile).int(), 1))
        by_group = self.weight_scale.transpose(0, 1).clone(memory_format=torch.contiguous_format)
        scale = self.weight_scale.data.view(by_group.shape).copy_(by_group)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)
        self.is_packed = True

    def stored(self, name: str):
        """The parameter of this name as it is on disk."""
        parameter = getattr(self, name)
        if not self.is_packed or name == "bias":
            return parameter
        if name == "weight_scale":
            return parameter.transpose(0, 1).contiguous()
        halves = 2 if CPU_VECTORS == "AVX512" else 1
        tiles = parameter.view(-1, 2 * parameter.shape[1], halves, 16)  # [tiles, columns, halves, 16]
        numbers = torch.stack((tiles & 15, tiles >> 4), 1)  # [tiles, 2, columns, halves, 16]
        return to_bytes(numbers.permute(0, 1, 3, 4, 2).reshape(len(parameter), -1))

    def _apply(self, fn, recurse=True):
        # another device has no use for this layout
        if self.is_packed:
            for name in ("weight", "weight_scale"):
                setattr(self, name, nn.Parameter(self.stored(name), requires_grad=False))
            self.is_packed = False
        super()._apply(fn, recurse)
        self.pack()
        return self


# ------------------------------------------------------------------------------------------ whole models

KINDS = {"int8": Int8Linear, "int4": Int4Linear}


def quantise_linears(module: nn.Module, kind: str):
    """Replaces every nn.Linear inside a module by a layer of this kind, one at a time."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is not nn.Linear:
                continue
            layer = KINDS[kind]
            # 4 bits cost the logits more than they save: the layer is a fiftieth of a 7B model
            if name == "lm_head":
                layer = Int8Linear
            elif kind == "int4" and child.in_features % GROUP:
                _log_once(f"int4: layers of {child.in_features} columns, no multiple of {GROUP}, have 8 bits")
                layer = Int8Linear
            setattr(parent, name, layer(child))


def pack_linears(module: nn.Module):
    """Makes layers that were made without memory ready to compute, now that they have their weights."""
    for child in module.modules():
        if isinstance(child, Int4Linear):
            child.pack()


def kind_of(module: nn.Module) -> str | None:
    """int4 if any layer inside is, else int8 if any is, else None."""
    layers = {type(child) for child in module.modules()}
    for kind in ("int4", "int8"):
        if KINDS[kind] in layers:
            return kind
    return None
