"""The decoder (Llama family), its key-value cache, and LoRA beside its layers.

A family is a row of FAMILIES; which one a folder holds is read from its `config.json`. Modules bear the published
parameter names. The cache is passed in, never stored in modules: a layer hands its queries, keys and values to
`attend`, and what that does (training, prefill, a decoding step) is the caller's choice.
"""

import math
from dataclasses import dataclass, field, fields, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from attention import attention, shared_prefix_attention
from plumbing.checkpoint import NameMap


@dataclass(frozen=True)
class DecoderConfig:
    """The fields of config.json that the decoder is made of, under their published names; last, the switches."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    hidden_act: str
    tie_word_embeddings: bool
    rope_theta: float
    rope_scaling: dict
    partial_rotary_factor: float
    original_max_position_embeddings: int | None
    sliding_window: int | None
    max_window_layers: int  # layers below it see everything
    qkv_bias: bool = False
    qk_norm: bool = False
    norm_offset: float = 0.0  # Gemma stores the norms' weights less one
    scaled_embeddings: bool = False  # by √hidden_size

    def window(self, layer: int) -> int | None:
        return self.sliding_window if layer >= self.max_window_layers else None

    @property
    def rope_switch(self) -> int | None:
        """longrope has two sets of frequencies, one for rows up to this length and one for longer rows."""
        return self.original_max_position_embeddings if self.rope_scaling["rope_type"] == "longrope" else None


NAMES = NameMap(dropped=r"rotary_emb\.inv_freq$|position_ids$")


@dataclass(frozen=True)
class DecoderFamily:
    defaults: dict  # what `transformers` takes where config.json is silent
    switches: dict = field(default_factory=dict)
    supported: dict = field(default_factory=dict)  # fields that change the result -> the one value we compute with
    names: NameMap = NAMES


_LLAMA = DecoderFamily(
    defaults=dict(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        max_position_embeddings=2048, rms_norm_eps=1e-6, hidden_act="silu", tie_word_embeddings=False,
        rope_theta=10000.0, partial_rotary_factor=1.0, original_max_position_embeddings=None, sliding_window=None,
        max_window_layers=0,
    ),
    supported=dict(attention_bias=False, mlp_bias=False),
)  # fmt: skip
_QWEN = _LLAMA.defaults | dict(
    vocab_size=151936, intermediate_size=22016, num_key_value_heads=32, max_position_embeddings=32768,
    use_sliding_window=False, sliding_window=4096, max_window_layers=28,
)  # fmt: skip

FAMILIES = {  # model_type, less the published "libra_"
    "llama": _LLAMA,  # Llama 2 and 3, Vicuna, Meditron
    "mistral": replace(
        _LLAMA,
        defaults=_LLAMA.defaults | dict(
            intermediate_size=14336, num_key_value_heads=8, max_position_embeddings=131072, sliding_window=4096
        ),
    ),
    "qwen2": DecoderFamily(_QWEN, switches=dict(qkv_bias=True)),
    "qwen3": DecoderFamily(
        _QWEN | dict(head_dim=128), switches=dict(qk_norm=True), supported=dict(attention_bias=False)
    ),
    "phi3": DecoderFamily(  # Phi-3, Phi-4 and Phi-4-mini
        _LLAMA.defaults | dict(
            vocab_size=32064, hidden_size=3072, intermediate_size=8192, max_position_embeddings=4096,
            original_max_position_embeddings=4096, rms_norm_eps=1e-5,
        ),
        supported=dict(attention_bias=False),
        names=replace(
            NAMES,
            fused={"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")},
        ),
    ),
    "gemma": DecoderFamily(
        _LLAMA.defaults | dict(
            vocab_size=256000, hidden_size=3072, intermediate_size=24576, num_hidden_layers=28, num_attention_heads=16,
            num_key_value_heads=16, head_dim=256, max_position_embeddings=8192, hidden_act="gelu_pytorch_tanh",
            tie_word_embeddings=True,
        ),
        switches=dict(norm_offset=1.0, scaled_embeddings=True),
        supported=dict(attention_bias=False),
    ),
}  # fmt: skip

ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh")}

ROPE_FIELDS = {  # rope type -> the fields that it needs
    "default": (),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor"),
}


def family_of(config: dict) -> str | None:
    """The row of FAMILIES that a parsed config.json belongs to, published or stock."""
    model_type = str(config.get("model_type")).removeprefix("libra_")
    return {"libra": "llama"}.get(model_type, model_type)


def names_of(config: dict) -> NameMap:
    """How the family of a parsed config.json names its parameters on disk."""
    return FAMILIES[family_of(config)].names


def decoder_config(config: dict, source) -> DecoderConfig:
    """A parsed config.json -> DecoderConfig; ValueError that names the field where a value is not supported."""
    where = f"{source}/config.json"
    if family_of(config) not in FAMILIES:
        known = ", ".join(["libra", *(f"libra_{name}" for name in FAMILIES if name != "llama"), *FAMILIES])
        raise ValueError(f"{where}: model_type {config.get('model_type')!r} is not one of {known}")
    family = FAMILIES[family_of(config)]
    values = family.defaults | config | family.switches
    for name, value in family.supported.items():
        if values.get(name, value) != value:
            raise ValueError(f"{where}: {name} {values[name]!r} is not supported, only {value!r}")
    if values["hidden_act"] not in ACTIVATIONS:
        raise ValueError(f"{where}: hidden_act {values['hidden_act']!r} is not one of {', '.join(ACTIVATIONS)}")
    heads = values["num_attention_heads"]
    for name, default in (("num_key_value_heads", heads), ("head_dim", values["hidden_size"] // heads)):
        values[name] = values.get(name) or default  # both may be null
    if not values.get("use_sliding_window", True):
        values["sliding_window"] = None
    scaling = values.get("rope_parameters") or values.get("rope_scaling") or {}  # `transformers` 5 renamed it
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    lacking = [name for name in ROPE_FIELDS.get(kind, ()) if name not in scaling]
    if kind not in ROPE_FIELDS or lacking:
        reason = f"lacks {', '.join(lacking)}" if lacking else f"is none of {', '.join(ROPE_FIELDS)}"
        raise ValueError(f"{where}: rope_scaling of type {kind!r} {reason}")
    moved = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
    values |= {name: scaling[name] for name in moved if name in scaling}
    values["rope_scaling"] = scaling | {"rope_type": kind}
    return DecoderConfig(**{field.name: values[field.name] for field in fields(DecoderConfig) if field.name in values})


def rope_frequencies(config: DecoderConfig, device) -> torch.Tensor:
    """Angle per position of each rotated pair of channels, [R / 2], float32 (Su et al. 2021).

    llama3 scaling as published; longrope (Ding et al. 2024) has two rows, [2, R / 2]: for short and long rows.
    """
    R = int(config.head_dim * config.partial_rotary_factor)
    frequencies = config.rope_theta ** -(torch.arange(0, R, 2, device=device).float() / R)
    scaling = config.rope_scaling
    if scaling["rope_type"] == "llama3":
        turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # in the original context
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)  # fast channels stay, slow ones stretch by the factor
        frequencies = keep * frequencies + (1 - keep) * frequencies / scaling["factor"]
    if scaling["rope_type"] == "longrope":
        frequencies = frequencies / torch.tensor([scaling["short_factor"], scaling["long_factor"]], device=device)
    return frequencies


def rope(config: DecoderConfig, positions, lengths):
    """cos and sin [B, 1, T, R] of positions [B, T] in rows whose prefix has lengths [B], for `rotate`."""
    frequencies, scale = rope_frequencies(config, positions.device), 1.0
    if config.rope_switch:
        frequencies = frequencies[(lengths > config.rope_switch).long()][:, None, None]  # [B, 1, 1, R / 2]
        factor = config.max_position_embeddings / config.rope_switch
        scale = math.sqrt(1 + math.log(factor) / math.log(config.rope_switch)) if factor > 1 else 1.0
        scale = config.rope_scaling.get("attention_factor") or scale
    angles = positions[:, None, :, None].float() * frequencies  # [B, 1, T, R / 2]
    angles = torch.cat((angles, angles), -1)
    return angles.cos() * scale, angles.sin() * scale


def rotate(x, cos, sin):
    """Rotary embedding: x [B, H, T, D], cos and sin [B, 1, T, R]; of the first R channels, i pairs with i + R / 2."""
    R = cos.shape[-1]
    if x.shape[-1] > R:
        return torch.cat((rotate(x[..., :R], cos, sin), x[..., R:]), -1)
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat((-right, left), -1) * sin


class RMSNorm(nn.Module):
    def __init__(self, width: int, config: DecoderConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.full((width,), 1 - config.norm_offset))
        self.eps, self.offset = config.rms_norm_eps, config.norm_offset

    def forward(self, x):
        h = x.float()
        h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + self.eps)
        return (h * (self.weight.float() + self.offset)).to(x.dtype)


class SelfAttention(nn.Module):
    def __init__(self, config: DecoderConfig):
        super().__init__()
        C, self.D = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(C, config.num_attention_heads * self.D, bias=config.qkv_bias)
        self.k_proj = nn.Linear(C, config.num_key_value_heads * self.D, bias=config.qkv_bias)
        self.v_proj = nn.Linear(C, config.num_key_value_heads * self.D, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.num_attention_heads * self.D, C, bias=False)
        if config.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(self.D, config), RMSNorm(self.D, config)
        self.qk_norm = config.qk_norm

    def forward(self, x, cos, sin, attend):
        q, k, v = (
            project(x).unflatten(-1, (-1, self.D)).transpose(1, 2)  # [B, H, T, D]
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        out = attend(rotate(q, cos, sin), rotate(k, cos, sin), v)  # [B, H, T, D]
        return self.o_proj(out.transpose(1, 2).flatten(2))


def recomputed(function, *tensors):
    """function(*tensors), whose inner results are not kept for the backward pass but computed there again.

    For what is cheap to compute and large to keep: on the random model of middle size a training step of LoRA (rank
    128, two rows) takes 3.3 GiB with it and 4.6 without, one of the connector (four rows) 4.9 and 5.4.
    """
    return checkpoint(function, *tensors, use_reentrant=False) if torch.is_grad_enabled() else function(*tensors)


class MLP(nn.Module):
    def __init__(self, config: DecoderConfig):
        super().__init__()
        C, hidden = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(C, hidden, bias=False)
        self.up_proj = nn.Linear(C, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, C, bias=False)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, x):
        gated = lambda gate, up: self.activation(gate) * up
        return self.down_proj(recomputed(gated, self.gate_proj(x), self.up_proj(x)))


class DecoderLayer(nn.Module):
    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config)
        self.self_attn = SelfAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, attend):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config)
        self.gradient_checkpointing = False  # in training, compute each layer again in the backward pass: less memory
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, x, positions, attend=None, lengths=None):
        """embeddings [B, T, C], positions [B, T] -> hidden [B, T, C], normed.

        attend(layer, q, k, v) -> [B, H, T, D]; by default plain causal attention, without a cache.
        lengths [B]: of each row's prefix, which chooses longrope's frequencies; by default of the row.
        """
        config = self.config
        attend = attend or (lambda layer, q, k, v: attention(q, k, v, causal=True, window=config.window(layer)))
        cos, sin = rope(config, positions, positions.amax(1) + 1 if lengths is None else lengths)
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        if config.scaled_embeddings:
            x = x * torch.tensor(config.hidden_size**0.5, dtype=x.dtype)
        for index, layer in enumerate(self.layers):
            run = partial(checkpoint, layer, use_reentrant=False) if self.gradient_checkpointing else layer
            x = run(x, cos, sin, partial(attend, index))
        return self.norm(x)

    def head(self, hidden, vocabulary: int):
        """hidden [..., C] -> logits [..., V] of the first `vocabulary` ids."""
        weight = self.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight
        return F.linear(hidden, weight[:vocabulary])


class Cache:
    """Keys and values of B studies: of each, one prefix, stored once, and K short suffixes behind it.

    prefix[layer] is (keys, values), each [B, H_kv, P, D], of which lengths[b] positions are filled.
    suffix[layer] is [2, B, K, H_kv, S, D], of which `steps` positions are filled.
    """

    BLOCK = 64  # suffixes grow by this many positions: a copy of the suffixes every 64 steps, never of a prefix

    def __init__(self, config: DecoderConfig, studies: int, positions: int, device, dtype):
        self.config, self.lengths, self.steps = config, torch.zeros(studies, dtype=torch.long, device=device), 0
        shape = (studies, config.num_key_value_heads, positions, config.head_dim)
        # zeros: positions behind a shorter prompt take part with weight 0, and 0 * NaN would be NaN
        empty = lambda: torch.zeros(shape, device=device, dtype=dtype)
        self.prefix = [(empty(), empty()) for _ in range(config.num_hidden_layers)]

    def reserve(self, positions: int):
        """Make room for prefixes of this many positions (a chat grows; a report never comes here)."""
        for layer, pair in enumerate(self.prefix):
            if (more := positions - pair[0].shape[2]) > 0:
                self.prefix[layer] = tuple(F.pad(x, (0, 0, 0, more)) for x in pair)

    def prefill(self, study: int):
        """An `attend` that stores one study's next T positions [1, H, T, D] behind its prefix, and attends to it all.

        The caller adds T to lengths[study] when every layer has run.
        """
        start = int(self.lengths[study])

        def attend(layer, q, k, v):
            stop = start + q.shape[2]
            keys, values = (x[study : study + 1, :, :stop] for x in self.prefix[layer])
            keys[:, :, start:], values[:, :, start:] = k, v
            return attention(q, keys, values, causal=True, window=self.config.window(layer))

        return attend

    def start(self, continuations: int):
        """Begin K continuations of every study."""
        self.steps = 0
        B, H, _, D = self.prefix[0][0].shape
        self.suffix = [keys.new_empty(2, B, continuations, H, 0, D) for keys, _ in self.prefix]

    def step(self):
        """An `attend` for the next position of every continuation: q, k, v [B, H, K, D].

        The caller adds 1 to steps when every layer has run.
        """

        def attend(layer, q, k, v):
            if self.steps == self.suffix[layer].shape[4]:
                self.suffix[layer] = F.pad(self.suffix[layer], (0, 0, 0, self.BLOCK))
            new = torch.stack((k, v)).transpose(2, 3)  # [2, B, K, H_kv, D]
            self.suffix[layer][..., self.steps, :] = new
            suffix_k, suffix_v = self.suffix[layer][..., : self.steps + 1, :]
            window = self.config.window(layer)
            return shared_prefix_attention(q, *self.prefix[layer], self.lengths, suffix_k, suffix_v, window)

        return attend

    def reorder(self, parents):
        """Continuation k of study b goes on from parents[b][k]: the suffixes move, the prefixes stay."""
        K = len(parents[0])
        if all(row == list(range(K)) for row in parents):
            return
        rows = torch.tensor([b * K + k for b, row in enumerate(parents) for k in row], device=self.lengths.device)
        for suffix in self.suffix:
            filled = suffix.flatten(1, 2)[..., : self.steps, :]  # [2, B * K, H_kv, steps, D], a view
            filled.copy_(filled[:, rows])
