"""One Llama-family decoder for every language model, and its key-value cache.

A family is a row of FAMILIES; plumbing/families.py reads which one a `config.json` describes. Modules have the
published parameter names, so that weights load by name.

Modules store no keys and values. A layer hands its queries, keys and values to `attend`, and the caller chooses what
that is: `WholeRows` (training, no cache), `Prefill` (fill the cache with a prompt) or `DecodingStep` (one more token).

A decoding step has little to compute and many operations to start, which is what a GPU waits for. So that they are few
(some 730 for 32 layers, which a test counts), layers that read the same input are joined (`SideBySide`), and whatever
all layers share is computed once: the rotation and the masks.
"""

import copy
import math
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from attention import StepMasks, attention, shared_prefix_attention, step_masks
from plumbing.checkpoint import NameMap
from plumbing.fields import Positive, Range, Size
from plumbing.quantised import Int4Linear, Int8Linear

Heads = Annotated[int, Range(1, 4096)]
Positions = Annotated[int, Range(2, 2**30)]
Factors = tuple[Positive, ...]


@dataclass(frozen=True)
class DecoderConfig:
    """The fields of config.json that define the decoder, under their published names, and a family's switches."""

    # sizes
    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Annotated[int, Range(1, 1000)]
    num_attention_heads: Heads
    num_key_value_heads: Heads
    head_dim: Annotated[int, Range(2, 4096)]
    max_position_embeddings: Positions
    rms_norm_eps: Annotated[float, Range(1e-12, 1)]
    hidden_act: Literal["silu", "gelu", "gelu_pytorch_tanh"]
    tie_word_embeddings: bool
    # biases: on q, k, v and o; in the MLP
    attention_bias: bool = False
    mlp_bias: bool = False
    # rotary embeddings; config.json nests the scaling in rope_scaling or rope_parameters
    rope_theta: Annotated[float, Range(1, 1e12)] = 10000.0
    partial_rotary_factor: Annotated[float, Range(0, 1)] = 1.0
    rope_type: Literal["default", "linear", "llama3", "longrope"] = "default"
    factor: Positive | None = None
    low_freq_factor: Positive | None = None
    high_freq_factor: Positive | None = None
    short_factor: Factors | None = None
    long_factor: Factors | None = None
    attention_factor: Positive | None = None
    original_max_position_embeddings: Positions | None = None
    # a sliding window: in the layers that layer_types names, else from max_window_layers on
    sliding_window: Size | None = None
    use_sliding_window: bool = True
    max_window_layers: Annotated[int, Range(0, 2**20)] = 0
    layer_types: tuple[Literal["full_attention", "sliding_attention"], ...] | None = None
    # switches of the family
    qkv_bias: bool = False
    qk_norm: bool = False
    norm_offset: float = 0.0  # Gemma stores its norm weights minus one
    scaled_embeddings: bool = False  # multiply embeddings by √hidden_size

    def window(self, layer: int) -> int | None:
        """Number of latest positions that a layer sees; None: all of them."""
        if self.layer_types is not None:
            has_window = self.layer_types[layer] == "sliding_attention"
        else:
            has_window = layer >= self.max_window_layers
        return self.sliding_window if has_window else None

    @property
    def rotated(self) -> int:
        """Number of channels of a head that are rotated; an odd number is rounded up."""
        channels = int(self.head_dim * self.partial_rotary_factor)
        return channels + channels % 2

    @property
    def rope_switch(self) -> int | None:
        """Row length above which longrope uses its second set of frequencies; None for other rope types."""
        return self.original_max_position_embeddings if self.rope_type == "longrope" else None


NAMES = NameMap(dropped=r"rotary_emb\.inv_freq$|position_ids$")


@dataclass(frozen=True)
class DecoderFamily:
    """`transformers` ignores a field that its model of the family does not read, and so do we: a Llama has no window,
    whatever its config.json says. What changes the result is in `defaults` or in `supported`; the tests compare both
    with the fields that `transformers` knows.
    """

    defaults: dict  # the fields that the family reads -> what `transformers` assumes where config.json is silent
    switches: dict = field(default_factory=dict)
    supported: dict = field(default_factory=dict)  # fields that would change the result -> what they may be
    names: NameMap = NAMES
    aliases: dict = field(default_factory=dict)  # field -> {value in a file: what it means}

    def meaning(self, name: str, value):
        known = self.aliases.get(name, {})
        return known.get(value, value) if isinstance(value, str) else value


# every family: no settings of single layers. Every family but Phi-3: `transformers` rotates the whole of each head
SUPPORTED = dict(per_layer_config=type(None), partial_rotary_factor=Annotated[float, Range(1, 1)] | None)

_LLAMA = DecoderFamily(
    defaults=dict(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=None, head_dim=None, max_position_embeddings=2048, rms_norm_eps=1e-6, hidden_act="silu",
        tie_word_embeddings=False, rope_theta=10000.0, original_max_position_embeddings=None,
        attention_bias=False, mlp_bias=False,
    ),
    supported=SUPPORTED,
)  # fmt: skip
_BASE = {name: value for name, value in _LLAMA.defaults.items() if name not in ("attention_bias", "mlp_bias")}
_QWEN = _BASE | dict(
    vocab_size=151936, intermediate_size=22016, num_key_value_heads=32, max_position_embeddings=32768,
    use_sliding_window=False, sliding_window=4096, max_window_layers=28, layer_types=None,
)  # fmt: skip

# key: model_type without the published prefix "libra_"
FAMILIES = {
    # Llama 2 and 3, Vicuna, Meditron
    "llama": _LLAMA,
    # grouped-query attention and a sliding window in every layer. With layer_types, `transformers` 4 ignores them and 5
    # takes the file for a Ministral: they agree where every layer has the window
    "mistral": DecoderFamily(
        _BASE | dict(
            intermediate_size=14336, num_key_value_heads=8, max_position_embeddings=131072, sliding_window=4096,
        ),
        supported=SUPPORTED | dict(layer_types=tuple[Literal["sliding_attention"], ...] | None),
    ),
    # biases on q, k and v
    "qwen2": DecoderFamily(_QWEN, switches=dict(qkv_bias=True), supported=SUPPORTED),
    # a norm on each head's q and k instead
    "qwen3": DecoderFamily(
        _QWEN | dict(head_dim=128, attention_bias=False),
        switches=dict(qk_norm=True),
        supported=SUPPORTED,
    ),
    # Phi-3, Phi-4 and Phi-4-mini: projections fused on disk, partial rotary embeddings, longrope
    "phi3": DecoderFamily(
        _BASE | dict(
            vocab_size=32064, hidden_size=3072, intermediate_size=8192, max_position_embeddings=4096,
            original_max_position_embeddings=4096, rms_norm_eps=1e-5, sliding_window=None, partial_rotary_factor=1.0,
        ),
        supported=dict(per_layer_config=type(None), rope_type=Literal["default", "longrope"]),
        names=replace(NAMES, fused={
            "qkv_proj": ("q_proj", "k_proj", "v_proj"),
            "gate_up_proj": ("gate_proj", "up_proj"),
        }),
        # what Phi-3's first files call longrope
        aliases=dict(rope_type=dict(su="longrope", yarn="longrope")),
    ),
    # Gemma 1: tied and scaled embeddings, norm weights stored minus one. Its first files say "gelu" and mean tanh's
    # approximation, which `hidden_activation` named for a while
    "gemma": DecoderFamily(
        _BASE | dict(
            vocab_size=256000, hidden_size=3072, intermediate_size=24576, num_hidden_layers=28, num_attention_heads=16,
            num_key_value_heads=16, head_dim=256, max_position_embeddings=8192, hidden_act="gelu_pytorch_tanh",
            tie_word_embeddings=True, attention_bias=False,
        ),
        switches=dict(norm_offset=1.0, scaled_embeddings=True),
        supported=SUPPORTED | dict(
            hidden_activation=Literal["gelu_pytorch_tanh"] | None,
            use_bidirectional_attention=Literal[False] | None,
        ),
        aliases=dict(hidden_act=dict(gelu="gelu_pytorch_tanh")),
    ),
}  # fmt: skip

ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
}

# ------------------------------------------------------------------------------------------ rotary embeddings


def rope_frequencies(config: DecoderConfig, device) -> torch.Tensor:
    """Angle per position of each rotated pair of channels, float32 [R / 2] (Su et al. 2021, RoFormer).

    With longrope (Ding et al. 2024) [2, R / 2]: the frequencies of short rows, then those of long rows.
    """
    R = int(config.head_dim * config.partial_rotary_factor)
    exponents = torch.arange(0, R, 2, device=device).float() / R  # [R / 2]
    frequencies = config.rope_theta**-exponents
    if config.rope_type == "linear":
        # Chen et al. 2023, Positional Interpolation
        frequencies = frequencies / config.factor
    if config.rope_type == "llama3":
        # Llama 3.1: channels that turn often within the original context keep their frequency, slow ones are
        # stretched by the factor, and those in between are interpolated
        turns = config.original_max_position_embeddings * frequencies / (2 * math.pi)
        low, high = config.low_freq_factor, config.high_freq_factor
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = keep * frequencies + (1 - keep) * frequencies / config.factor
    if config.rope_type == "longrope":
        factors = [config.short_factor, config.long_factor]
        frequencies = frequencies / torch.tensor(factors, device=device)
    return frequencies


class Rotation(NamedTuple):
    """What every position's channels are multiplied by, each [B, 1, T, R]: x · cos + (x with its halves swapped) · sin.

    sin is negative in the left half.
    """

    cos: torch.Tensor
    sin: torch.Tensor


def rope(config: DecoderConfig, positions, lengths, dtype) -> Rotation:
    """The rotation of each position; positions [B, T], lengths [B] of each row's prefix (longrope needs them)."""
    frequencies, scale = rope_frequencies(config, positions.device), 1.0
    if config.rope_switch:
        # each row uses the frequencies for its own length, and attention is sharpened by a constant
        is_long = (lengths > config.rope_switch).long()
        frequencies = frequencies[is_long][:, None, None]  # [B, 1, 1, R / 2]
        factor = config.factor or config.max_position_embeddings / config.rope_switch
        if factor > 1:
            scale = math.sqrt(1 + math.log(factor) / math.log(config.rope_switch))
        scale = config.attention_factor or scale
    # both halves of the channels turn by the same angles
    angles = positions[:, None, :, None].float() * frequencies  # [B, 1, T, R / 2]
    cos = angles.cos() * scale
    sin = angles.sin() * scale
    cos = torch.cat((cos, cos), -1)  # [B, 1, T, R]
    sin = torch.cat((-sin, sin), -1)
    return Rotation(cos.to(dtype), sin.to(dtype))


def rotate(x, rotation: Rotation):
    """Rotates the first R of D channels; x [B, H, T, D]. Channel i is paired with channel i + R / 2."""
    R = rotation.cos.shape[-1]
    # partial rotary embeddings: the channels after R stay as they are
    if x.shape[-1] > R:
        rotated = rotate(x[..., :R], rotation)
        return torch.cat((rotated, x[..., R:]), -1)
    # (left, right) · cos + (right, left) · (-sin, sin)
    left, right = x.chunk(2, -1)
    swapped = torch.cat((right, left), -1)
    return torch.addcmul(x * rotation.cos, swapped, rotation.sin)


# ------------------------------------------------------------------------------------------ layers


def recompute_in_backward(function, *tensors):
    """Calls function(*tensors); intermediate results are computed again in the backward pass instead of kept.

    On the model of `python -m bench --size mid` it saves 1.3 of 4.6 GiB in a LoRA step (rank 128, two rows), and 0.5 of
    5.4 GiB in a step of the connector (four rows).
    """
    if not torch.is_grad_enabled():
        return function(*tensors)
    return checkpoint(function, *tensors, use_reentrant=False)


class RMSNorm(nn.Module):
    def __init__(self, width: int, config: DecoderConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.full((width,), 1 - config.norm_offset))
        self.eps, self.offset = config.rms_norm_eps, config.norm_offset

    def forward(self, x):
        """x / √(mean of x² + eps) · weight, in float32, whatever the types are."""
        weight = self.weight
        if self.offset:
            weight = weight.float() + self.offset
        # one kernel, which computes in float32, where the types agree; it would keep float64
        if x.dtype == weight.dtype and x.dtype != torch.float64:
            return F.rms_norm(x, weight.shape, weight, self.eps)
        return F.rms_norm(x.float(), weight.shape, weight.float(), self.eps).to(x.dtype)


class SideBySide(nn.Module):
    """A block with linear layers that read the same input: one product computes all of them once they are joined."""

    names: tuple[str, ...]  # of the layers, in the order of their rows

    def __init__(self):
        super().__init__()
        # a list, because this is no module of the block's: its parameters are those of the layers
        self.joined: list[nn.Module] = []

    def join(self, device=None):
        """Puts the parameters of the layers into one matrix, rows below rows, of which each layer's are a view.

        On the meta device there is nothing to copy: then the matrix is made on `device`, without values.
        """
        layers = [getattr(self, name) for name in self.names]
        # rows are not the first dimension of what a CPU kernel takes
        if isinstance(layers[0], Int4Linear):
            return
        joined = copy.deepcopy(layers[0])
        for name, parameter in layers[0].named_parameters():
            # weight, and also the bias, and the scales of int8
            parts = [getattr(layer, name) for layer in layers]
            sizes = [len(part) for part in parts]
            shape = (sum(sizes), *parameter.shape[1:])
            whole = torch.empty(shape, dtype=parameter.dtype, device=device or parameter.device)
            for layer, part, rows in zip(layers, parts, whole.split(sizes), strict=True):
                if not part.is_meta:
                    rows.copy_(part.detach())
                setattr(layer, name, nn.Parameter(rows, part.requires_grad))
            setattr(joined, name, nn.Parameter(whole, requires_grad=False))
        self.joined = [joined]

    def __setattr__(self, name, value):
        # one of the layers is replaced, as LoRA does
        if name in self.names:
            self.joined = []
        super().__setattr__(name, value)

    def _apply(self, fn, recurse=True):
        # `.to()` gives each layer memory of its own
        self.joined = []
        return super()._apply(fn, recurse)

    def project(self, x) -> list[torch.Tensor]:
        """x [..., columns] -> what each layer gives, [..., its rows]."""
        layers = [getattr(self, name) for name in self.names]
        # gradients belong to the layers
        if torch.is_grad_enabled() or not self.joined:
            return [layer(x) for layer in layers]
        sizes = [len(layer.weight) for layer in layers]
        return list(self.joined[0](x).split(sizes, -1))


class SelfAttention(SideBySide):
    names = ("q_proj", "k_proj", "v_proj")

    def __init__(self, config: DecoderConfig):
        super().__init__()
        C, D, self.D = config.hidden_size, config.head_dim, config.head_dim
        qkv_bias = config.qkv_bias or config.attention_bias
        self.q_proj = nn.Linear(C, config.num_attention_heads * D, bias=qkv_bias)
        self.k_proj = nn.Linear(C, config.num_key_value_heads * D, bias=qkv_bias)
        self.v_proj = nn.Linear(C, config.num_key_value_heads * D, bias=qkv_bias)
        self.o_proj = nn.Linear(config.num_attention_heads * D, C, bias=config.attention_bias)
        self.qk_norm = config.qk_norm
        if self.qk_norm:
            self.q_norm = RMSNorm(D, config)
            self.k_norm = RMSNorm(D, config)

    def forward(self, x, rotation: Rotation, attend):
        q, k, v = map(self.split_heads, self.project(x))  # [B, H, T, D], [B, H_kv, T, D] twice
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        # rotate both at once
        sizes = (q.shape[1], k.shape[1])
        q, k = rotate(torch.cat((q, k), 1), rotation).split(sizes, 1)
        # attention, as the caller chose it
        out = attend(q, k, v)  # [B, H, T, D]
        # join the heads
        return self.o_proj(out.transpose(1, 2).flatten(2))  # [B, T, C]

    def split_heads(self, x):
        return x.unflatten(-1, (-1, self.D)).transpose(1, 2)  # [B, T, H * D] -> [B, H, T, D]


class MLP(SideBySide):
    names = ("gate_proj", "up_proj")

    def __init__(self, config: DecoderConfig):
        super().__init__()
        C, hidden = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(C, hidden, bias=config.mlp_bias)
        self.up_proj = nn.Linear(C, hidden, bias=config.mlp_bias)
        self.down_proj = nn.Linear(hidden, C, bias=config.mlp_bias)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, x):
        # keeping three tensors of the MLP's width for an elementwise product would be wasteful
        def gated(gate, up):
            return self.activation(gate) * up

        gate, up = self.project(x)
        h = recompute_in_backward(gated, gate, up)
        return self.down_proj(h)


class DecoderLayer(nn.Module):
    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config)
        self.self_attn = SelfAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config)
        self.mlp = MLP(config)

    def forward(self, x, rotation: Rotation, attend):
        x = x + self.self_attn(self.input_layernorm(x), rotation, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        # in training: compute each layer again in the backward pass, which saves memory and costs time
        self.gradient_checkpointing = False
        self.compiled_step = None  # a decoding step of one layer, after compile_step

    def join(self, device=None):
        """Joins the layers of every block, see `SideBySide.join`."""
        for block in self.modules():
            if isinstance(block, SideBySide):
                block.join(device)

    def separate(self):
        """The layers of every block are computed one by one again."""
        for block in self.modules():
            if isinstance(block, SideBySide):
                block.joined = []

    def compile_step(self, backend: str = "inductor"):
        """Compiles the decoding step of a layer. One graph serves all layers, steps and lengths of prefixes.

        `torch.compile` makes another one where one study becomes several, or one continuation of a study does.
        """
        # a function that gets its layer as an argument: a method would be compiled for each layer
        self.compiled_step = torch.compile(DecoderLayer.forward, fullgraph=True, dynamic=True, backend=backend)

    def forward(self, x, positions, attend=None, lengths=None):
        """embeddings [B, T, C], positions [B, T] -> hidden states [B, T, C] after the final norm.

        attend.in_layer(index) gives a function (q, k, v) -> [B, H, T, D]; without attend, plain causal attention.
        lengths [B]: length of each row's prefix, which selects longrope's frequencies; without it, of the row.
        """
        config = self.config
        attend = attend or WholeRows(config)
        if lengths is None:
            lengths = positions.amax(1) + 1
        # the same rotation for every layer
        rotation = rope(config, positions, lengths, x.dtype)
        if config.scaled_embeddings:
            # rounded to the embeddings' type, as published
            x = x * torch.tensor(config.hidden_size**0.5, dtype=x.dtype).item()

        for index, layer in enumerate(self.layers):
            attend_here = attend.in_layer(index)
            if self.gradient_checkpointing:
                x = checkpoint(layer, x, rotation, attend_here, use_reentrant=False)
            elif self.compiled_step and isinstance(attend, DecodingStep):
                x = self.compiled_step(layer, x, rotation, attend_here)
            else:
                x = layer(x, rotation, attend_here)
        return self.norm(x)

    def head(self, hidden, vocabulary: int):
        """hidden [..., C] -> logits [..., V] of the first `vocabulary` ids."""
        head = self.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        if isinstance(head, Int8Linear):
            return head.first_rows(hidden, vocabulary)
        return F.linear(hidden, head.weight[:vocabulary])


# ------------------------------------------------------------------------------------------ the cache


class Cache:
    """Keys and values of B studies: one prefix per study, stored once, and K short continuations of each.

    prefix[layer]: keys and values, each [B, H_kv, P, D]; row b has filled its first lengths[b] positions.
    suffix[layer]: [2, B, H_kv, K, S, D], keys then values; every continuation has filled `steps` positions.

    Each layer writes the keys and values of new positions after the filled ones; then the model calls `advance`.

    A study that has ended leaves the decoding steps: its row changes places with the last active one, and the steps
    compute the first rows only. `studies` says whose rows these are. After study 1 of four has left:

        studies  0 3 2        rows  0 3 2 1

    The two prompts of contrastive decoding are two rows of a study, side by side.
    """

    # suffixes grow by this many positions at a time: one copy of the suffixes every 64 steps, never of a prefix
    BLOCK = 64

    def __init__(self, config: DecoderConfig, num_studies: int, capacity: int, device, dtype, prompts: int = 1):
        """capacity: positions that the longest prefix can take. prompts: rows of a study."""
        self.config, self.prompts = config, prompts
        # the counters, changed only by advance, rewind, copy, start and leave
        rows = num_studies * prompts
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)  # of each prefix
        self.steps = 0  # of every suffix
        self.newest = torch.zeros((), dtype=torch.long, device=device)  # the same number, where a step needs a tensor
        self.order = list(range(num_studies))  # the study of each row, or pair of rows
        self.num_active = num_studies
        shape = (rows, config.num_key_value_heads, capacity, config.head_dim)
        # zeros, not empty: positions after a shorter prompt get weight 0, and 0 * NaN would be NaN
        self.prefix = []
        for _ in range(config.num_hidden_layers):
            keys = torch.zeros(shape, device=device, dtype=dtype)
            self.prefix.append((keys, torch.zeros_like(keys)))

    @property
    def studies(self) -> list[int]:
        """The studies that a decoding step computes, in the order of its rows."""
        return self.order[: self.num_active]

    @property
    def active(self) -> slice:
        """The rows that a decoding step computes."""
        return slice(0, self.num_active * self.prompts)

    def reserve(self, positions: int):
        """Makes room for prefixes of this many positions. Only a chat, whose prompt grows, needs it."""
        missing = positions - self.prefix[0][0].shape[2]
        if missing > 0:
            for layer, pair in enumerate(self.prefix):
                keys, values = (F.pad(x, (0, 0, 0, missing)) for x in pair)
                self.prefix[layer] = (keys, values)

    def advance(self, positions: int, row: int | None = None):
        """Counts positions that every layer has stored: of one row's prefix, or of every continuation."""
        if row is None:
            self.steps += positions
            self.newest += positions
        else:
            self.lengths[row] += positions

    def rewind(self, length: int, row: int):
        """Forgets a row's prefix from position `length` on."""
        self.lengths[row] = length

    def copy(self, source: int, target: int, length: int):
        """A row's prefix becomes the first positions of another row's."""
        for keys, values in self.prefix:
            keys[target, :, :length] = keys[source, :, :length]
            values[target, :, :length] = values[source, :, :length]
        self.lengths[target] = length

    def start(self, continuations: int):
        """Begins K empty continuations of every study; those that had left are back."""
        self.steps, self.num_active = 0, len(self.order)
        self.newest.zero_()
        B, H, _, D = self.prefix[0][0].shape
        self.suffix = [keys.new_empty(2, B, H, continuations, 0, D) for keys, _ in self.prefix]

    def leave(self, ended: list[int]) -> list[int]:
        """Takes studies that have ended out of the steps. Returns the studies that are left as places in `studies`
        before: what else has a row for each study keeps these."""
        before = self.studies
        for study in ended:
            self._put_last(study)
        return [before.index(study) for study in self.studies]

    def _put_last(self, study: int):
        place, last = self.order.index(study), self.num_active - 1
        self.num_active = last
        self.order[place], self.order[last] = self.order[last], study
        if place == last:
            return
        # exchange the rows: the prefix stays, because it may be continued again
        rows = [place * self.prompts + prompt for prompt in range(self.prompts)]
        rows += [last * self.prompts + prompt for prompt in range(self.prompts)]
        exchanged = rows[self.prompts :] + rows[: self.prompts]
        self.lengths[rows] = self.lengths[exchanged]
        for keys, values in self.prefix:
            keys[rows] = keys[exchanged]
            values[rows] = values[exchanged]
        for suffix in self.suffix:
            suffix[:, rows] = suffix[:, exchanged]

    def reorder(self, parents: list[list[int]]):
        """Continuation k of active row b becomes a copy of parents[b][k]. The suffixes move, the prefixes stay."""
        K = len(parents[0])
        # if every beam continues itself, nothing moves
        if all(row == list(range(K)) for row in parents):
            return
        parents = torch.tensor(parents, device=self.lengths.device)  # [B, K]
        rows = torch.arange(len(parents), device=parents.device)[:, None]  # [B, 1]
        for suffix in self.suffix:
            filled = suffix[..., : self.steps, :].movedim(3, 2)  # [2, B, K, H_kv, steps, D], a view
            filled[:, : len(parents)] = filled[:, rows, parents]

    def make_room(self):
        """Makes room for the next position of every suffix."""
        if self.steps == self.suffix[0].shape[4]:
            self.suffix = [F.pad(suffix, (0, 0, 0, self.BLOCK)) for suffix in self.suffix]


# The three kinds of `attend`: what a layer does with its queries, keys and values.


@dataclass(frozen=True)
class WholeRows:
    """Attention within whole rows, without a cache. Segments and positions [B, T] where the records of a row share a
    prefix."""

    config: DecoderConfig
    segments: torch.Tensor | None = None
    positions: torch.Tensor | None = None

    def in_layer(self, layer: int):
        window = self.config.window(layer)
        return partial(attention, causal=True, segments=self.segments, window=window, positions=self.positions)


@dataclass(frozen=True)
class Prefill:
    """Appends the next T positions of one row to its prefix, and attends to all of it."""

    cache: Cache
    row: int
    start: int  # positions that the prefix has already

    def in_layer(self, layer: int):
        return partial(self.attend, layer)

    def attend(self, layer: int, q, k, v):
        # views of the row's first positions, up to the last of the new ones
        keys, values = self.cache.prefix[layer]
        stop = self.start + q.shape[2]
        keys = keys[self.row, None, :, :stop]  # [1, H_kv, stop, D]
        values = values[self.row, None, :, :stop]
        # store, then attend
        keys[:, :, self.start :] = k
        values[:, :, self.start :] = v
        window = self.cache.config.window(layer)
        return attention(q, keys, values, causal=True, window=window)


class DecodingStep:
    """Stores the next position of all K continuations of all B active studies, and attends to prefix and own suffix."""

    def __init__(self, cache: Cache):
        cache.make_room()
        self.cache = cache
        # once a step: most models have one window, or none, for all layers
        config, lengths = cache.config, cache.lengths[cache.active]
        H_kv, P = cache.prefix[0][0].shape[1:3]
        sizes = (H_kv, P, cache.suffix[0].shape[4])
        self.masks = {}
        for window in {config.window(layer) for layer in range(config.num_hidden_layers)}:
            self.masks[window] = step_masks(lengths, cache.newest, sizes, window, cache.prefix[0][0].dtype)

    def in_layer(self, layer: int):
        cache = self.cache
        prefix_k, prefix_v = cache.prefix[layer]
        suffix = cache.suffix[layer]
        rows = cache.active
        masks = self.masks[cache.config.window(layer)]
        return LayerStep(prefix_k[rows], prefix_v[rows], suffix[0, rows], suffix[1, rows], cache.newest, masks)


@dataclass(frozen=True)
class LayerStep:
    """A decoding step in one layer: tensors alone, of shapes that change every 64 steps, so that it compiles once."""

    prefix_k: torch.Tensor  # [B, H_kv, P, D]
    prefix_v: torch.Tensor
    suffix_k: torch.Tensor  # [B, H_kv, K, S, D]
    suffix_v: torch.Tensor
    newest: torch.Tensor  # [], the place in the suffixes where the new position belongs
    masks: StepMasks

    def __call__(self, q, k, v):
        """q [B, H, K, D], k and v [B, H_kv, K, D]: the continuations take the place of positions."""
        place = self.newest[None]
        self.suffix_k.index_copy_(3, place, k[..., None, :])
        self.suffix_v.index_copy_(3, place, v[..., None, :])
        return shared_prefix_attention(q, self.prefix_k, self.prefix_v, self.suffix_k, self.suffix_v, self.masks)
