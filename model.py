"""The decoder (Llama family), its key-value cache, and Libra = encoder -> connector -> decoder.

A decoder family is a row of switches; which one a folder holds is read from its `config.json`. Modules bear the
published parameter names. The cache is passed in, never stored in modules: a layer hands its queries, keys and
values to `attend`, and what that does (training, prefill, a decoding step) is the caller's choice.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import checkpoint
from attention import attention, shared_prefix_attention
from encoder import Encoder, encoder_config, encoder_names, pixel_config, preprocess
from tac import TAC
from tokenizer import IMAGE, Tokenizer, template_of

# -------------------------------------------------------------------------------------------- decoder


@dataclass(frozen=True)
class DecoderConfig:
    """The fields of config.json that the decoder is made of, under their published names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict | None
    tie_word_embeddings: bool


@dataclass(frozen=True)
class Family:
    defaults: dict  # what `transformers` takes where config.json is silent
    supported: dict  # fields of config.json that change the result -> the one value we compute with


_LLAMA = Family(
    defaults=dict(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        max_position_embeddings=2048, rms_norm_eps=1e-6, rope_theta=10000.0, rope_scaling=None,
        tie_word_embeddings=False,
    ),
    supported=dict(hidden_act="silu", attention_bias=False, mlp_bias=False, partial_rotary_factor=1.0),
)  # fmt: skip

FAMILIES = {"libra": _LLAMA}

ROPE_FIELDS = {  # rope type -> the fields of rope_scaling that it needs
    "default": (),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def decoder_config(config: dict, source) -> DecoderConfig:
    """A parsed config.json -> DecoderConfig; ValueError that names the field where a value is not supported."""
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise ValueError(f"{source}/config.json: model_type {model_type!r} is not one of {', '.join(FAMILIES)}")
    family = FAMILIES[model_type]
    for name, value in family.supported.items():
        if config.get(name, value) != value:
            raise ValueError(f"{source}/config.json: {name} {config[name]!r} is not supported, only {value!r}")
    values = family.defaults | config
    heads = values["num_attention_heads"]
    for name, default in (("num_key_value_heads", heads), ("head_dim", values["hidden_size"] // heads)):
        values[name] = values.get(name) or default  # both may be null
    scaling = values["rope_scaling"] or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ROPE_FIELDS or (lacking := [name for name in ROPE_FIELDS[kind] if name not in scaling]):
        reason = f"lacks {', '.join(lacking)}" if kind in ROPE_FIELDS else f"is none of {', '.join(ROPE_FIELDS)}"
        raise ValueError(f"{source}/config.json: rope_scaling of type {kind!r} {reason}")
    return DecoderConfig(**{field.name: values[field.name] for field in fields(DecoderConfig)})


def rope_frequencies(config: DecoderConfig, device) -> torch.Tensor:
    """Angle per position of each pair of channels, [D / 2], float32 (Su et al. 2021; llama3 scaling as published)."""
    D = config.head_dim
    frequencies = config.rope_theta ** -(torch.arange(0, D, 2, device=device).float() / D)
    scaling = config.rope_scaling or {}
    if scaling.get("rope_type", scaling.get("type", "default")) == "llama3":
        turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # in the original context
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)  # fast channels stay, slow ones stretch by the factor
        frequencies = keep * frequencies + (1 - keep) * frequencies / scaling["factor"]
    return frequencies


def rotate(x, cos, sin):
    """Rotary embedding: x [B, H, T, D], cos and sin [B, 1, T, D]; channel i pairs with channel i + D / 2."""
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat((-right, left), -1) * sin


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        h = x.float()
        return self.weight * (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class SelfAttention(nn.Module):
    def __init__(self, config: DecoderConfig):
        super().__init__()
        C, self.D = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(C, config.num_attention_heads * self.D, bias=False)
        self.k_proj = nn.Linear(C, config.num_key_value_heads * self.D, bias=False)
        self.v_proj = nn.Linear(C, config.num_key_value_heads * self.D, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * self.D, C, bias=False)

    def forward(self, x, cos, sin, attend):
        q, k, v = (
            project(x).unflatten(-1, (-1, self.D)).transpose(1, 2)  # [B, H, T, D]
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = attend(rotate(q, cos, sin), rotate(k, cos, sin), v)  # [B, H, T, D]
        return self.o_proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config: DecoderConfig):
        super().__init__()
        C, hidden = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(C, hidden, bias=False)
        self.up_proj = nn.Linear(C, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, C, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = SelfAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
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
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, x, positions, attend=None):
        """embeddings [B, T, C], positions [B, T] -> hidden [B, T, C], normed.

        attend(layer, q, k, v) -> [B, H, T, D]; by default plain causal attention, without a cache.
        """
        attend = attend or (lambda layer, q, k, v: attention(q, k, v, causal=True))
        angles = positions[:, None, :, None].float() * rope_frequencies(self.config, x.device)  # [B, 1, T, D / 2]
        angles = torch.cat((angles, angles), -1)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for index, layer in enumerate(self.layers):
            x = layer(x, cos, sin, lambda q, k, v, index=index: attend(index, q, k, v))
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
            return attention(q, keys, values, causal=True)

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
            return shared_prefix_attention(q, *self.prefix[layer], self.lengths, suffix_k, suffix_v)

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


# -------------------------------------------------------------------------------------------- Libra


@dataclass(frozen=True)
class LibraConfig:
    """The fields of config.json that tie encoder, connector and decoder together, with the published defaults."""

    mm_vision_tower: str
    mm_projector_type: str = "linear"
    mm_vision_select_layer: str | int = -2
    mm_vision_select_feature: str = "patch"
    image_aspect_ratio: str | None = None
    mm_image_pad: str | None = None  # ours: what a model was trained with
    mm_use_im_patch_token: bool = True
    unfreeze_mm_vision_tower: bool = False


SUPPORTED = dict(  # fields of config.json -> the values that we compute with
    mm_projector_type=("TAC",),
    mm_vision_select_layer=("all",),
    mm_vision_select_feature=("patch",),
    mm_use_im_start_end=(False,),
    mm_image_pad=("mean", "black", "none"),
)
CONNECTOR_FILE = "mm_tac_projector.bin"
PREFIXES = {  # parameter names: published -> ours; the first that fits
    "model.mm_projector.": "connector.",
    "model.vision_tower.vision_tower.": "encoder.",
    "model.": "decoder.",
    "lm_head.": "decoder.lm_head.",
}
DEVICES = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available, "cpu": lambda: True}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def libra_config(config: dict, source) -> LibraConfig:
    """A parsed config.json -> LibraConfig; ValueError that names the field where a value is not supported."""
    if "mm_vision_tower" not in config:
        raise ValueError(f"{source}/config.json: no mm_vision_tower: this is a language model, not a Libra checkpoint")
    for name, values in SUPPORTED.items():
        if name in config and config[name] not in values:
            allowed = " or ".join(map(repr, values))
            raise ValueError(f"{source}/config.json: {name} {config[name]!r} is not supported, only {allowed}")
    return LibraConfig(**{field.name: config[field.name] for field in fields(LibraConfig) if field.name in config})


class Libra(nn.Module):
    """encoder -> connector -> decoder, with the tokenizer and the settings of its checkpoint.

    Made by `Libra.from_pretrained`. Attributes: config, tokenizer, template (the name of its conversation template),
    pixels (how an image becomes pixels), eos_token_ids, vocabulary (ids that may be generated: 0 … vocabulary - 1).
    """

    def __init__(self, config: LibraConfig, encoder, decoder: DecoderConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(encoder)
        self.connector = TAC(
            encoder.num_hidden_layers, encoder.hidden_size, decoder.num_attention_heads, decoder.hidden_size
        )
        self.decoder = Decoder(decoder)

    @classmethod
    def from_pretrained(
        cls,
        source,
        *,
        encoder=None,
        device: str = "auto",
        dtype: str = "auto",
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> "Libra":
        """Read a checkpoint in the published layout: a folder or a hub id, for inference (nothing requires gradients).

        encoder: folder or hub id, instead of the checkpoint's `mm_vision_tower`. device: auto (cuda, else mps, else
        cpu), cpu, cuda, mps. dtype: auto (float32 on the CPU, else the checkpoint's 16-bit type), float32, bfloat16,
        float16. progress(bytes done, bytes in all) is called as weights are read.
        ValueError, OSError or MemoryError, with one line, where the checkpoint, its encoder or its size do not fit.
        """
        device = find_device(device)
        source = checkpoint.locate(source)
        folder = source.folder
        raw = checkpoint.read_json(folder / "config.json")
        dtype = find_dtype(dtype, device, raw)
        config, decoder = libra_config(raw, folder), decoder_config(raw, folder)
        tokenizer = Tokenizer(folder, sentencepiece_first=raw["model_type"] == "libra")
        groups = {ours: {} for ours in ("connector.", "encoder.", "decoder.")}
        for name, tensor in checkpoint.stored_tensors(source).items():
            published = next((prefix for prefix in PREFIXES if name.startswith(prefix)), None)
            ours = PREFIXES[published] + name.removeprefix(published) if published else f"decoder.{name}"
            part = ours.split(".")[0] + "."
            groups[part][ours.removeprefix(part)] = tensor
        if not groups["connector."]:
            groups["connector."] = connector_tensors(source)
        for name in list(groups["decoder."]):
            tied = name == "lm_head.weight" and decoder.tie_word_embeddings
            if tied or name.endswith(("rotary_emb.inv_freq", "position_ids")):
                del groups["decoder."][name]

        tower = checkpoint.locate(encoder) if encoder else checkpoint.locate(config.mm_vision_tower, folder)
        encoder_folder = tower.folder
        encoder_settings = encoder_config(checkpoint.read_json(encoder_folder / "config.json"), encoder_folder)
        encoder_stored = checkpoint.stored_tensors(tower)
        if config.unfreeze_mm_vision_tower:  # adapted weights win over the stock ones
            encoder_stored |= groups["encoder."]
        names = encoder_names(encoder_settings, encoder_stored)
        groups["encoder."] = {ours: encoder_stored[name] for ours, name in names.items()}

        with torch.device("meta"):
            libra = cls(config, encoder_settings, decoder)
        sources = {"connector.": folder, "encoder.": encoder_folder, "decoder.": folder}
        for part, tensors in groups.items():
            checkpoint.match(getattr(libra, part[:-1]), tensors, sources[part])
        tensors = {part + name: tensor for part, group in groups.items() for name, tensor in group.items()}
        checkpoint.load(libra, tensors, device, dtype, progress)

        pad = config.mm_image_pad or ("mean" if config.image_aspect_ratio == "pad" else "none")
        settings = checkpoint.read_json(encoder_folder / "preprocessor_config.json")
        libra.pixels = pixel_config(settings, encoder_folder, pad)
        libra.tokenizer, libra.template = tokenizer, template_of(raw, tokenizer)
        libra.eos_token_ids = eos_token_ids(folder, raw)
        # published loading resizes the embeddings to the tokenizer and these tokens; rows beyond are never generated
        patch_token = config.mm_use_im_patch_token and tokenizer.backend.token_to_id("<im_patch>") is None
        libra.vocabulary = min(decoder.vocab_size, len(tokenizer) + patch_token)
        return libra.eval().requires_grad_(False)

    @property
    def device(self):
        return self.decoder.norm.weight.device

    @property
    def dtype(self):
        return self.decoder.norm.weight.dtype

    def preprocess(self, images) -> torch.Tensor:
        """PIL images in mode RGB -> pixels [len(images), 3, S, S], on the model's device and in its type."""
        return torch.stack([preprocess(image, self.pixels) for image in images]).to(self.device, self.dtype)

    def features(self, pixels) -> torch.Tensor:
        """pixels [2, 3, S, S] of (current, prior), or [1, 3, S, S] without a prior -> features [2, L, N, C].

        Without a prior the current image stands for it, encoded once.
        """
        config = self.config
        features = self.encoder(pixels, config.mm_vision_select_layer, config.mm_vision_select_feature)
        return features.expand(2, -1, -1, -1)

    def embed_images(self, pixels) -> torch.Tensor:
        """pixels of one study, as for `features` -> image embeddings [N, hidden]."""
        return self.connector(self.features(pixels)[None])[0]

    def splice(self, ids: list[int], image_embeddings) -> torch.Tensor:
        """ids with one IMAGE, and what stands in its place [N, hidden] -> embeddings [T, hidden]."""
        embed = lambda ids: self.decoder.embed_tokens(torch.tensor(ids, dtype=torch.long, device=self.device))
        if IMAGE not in ids:
            return embed(ids)
        at = ids.index(IMAGE)
        return torch.cat((embed(ids[:at]), image_embeddings, embed(ids[at + 1 :])))

    def logits(self, hidden) -> torch.Tensor:
        """hidden [..., C] -> logits [..., V], float32, of the ids that may be generated."""
        return self.decoder.head(hidden, self.vocabulary).float()

    def extend(self, cache: Cache, study: int, embeddings) -> torch.Tensor:
        """Prefill one study's next positions, embeddings [T, hidden], and return the logits [V] behind the last."""
        positions = cache.lengths[study] + torch.arange(len(embeddings), device=self.device)
        hidden = self.decoder(embeddings[None], positions[None], cache.prefill(study))
        cache.lengths[study] += len(embeddings)
        return self.logits(hidden[0, -1])

    def step(self, cache: Cache, tokens: list[list[int]]) -> torch.Tensor:
        """One decoding step: the newest ids of K continuations of B studies, [B][K] -> logits [B, K, V]."""
        embeddings = self.decoder.embed_tokens(torch.tensor(tokens, device=self.device))
        positions = (cache.lengths[:, None] + cache.steps).expand(-1, embeddings.shape[1])  # [B, K]
        hidden = self.decoder(embeddings, positions, cache.step())
        cache.steps += 1
        return self.logits(hidden)


def connector_tensors(source: checkpoint.Source) -> dict[str, checkpoint.Stored]:
    """Connector weights beside a checkpoint that holds none; {} where there are none either."""
    source.fetch([CONNECTOR_FILE])
    file = source.folder / CONNECTOR_FILE
    tensors = checkpoint.index(file) if file.exists() else {}
    return {name.removeprefix("model.mm_projector."): tensor for name, tensor in tensors.items()}


def find_device(name: str) -> torch.device:
    if name == "auto":
        name = next(device for device, available in DEVICES.items() if available())
    kind = name.split(":")[0]
    if kind not in DEVICES or not DEVICES[kind]():
        available = " and ".join(device for device, available in DEVICES.items() if available())
        raise ValueError(f"device {name!r} is not available here: there is {available}")
    return torch.device(name)


def find_dtype(name: str, device: torch.device, config: dict) -> torch.dtype:
    if name == "auto":
        recorded = config.get("torch_dtype") or config.get("dtype")
        name = "float32" if device.type == "cpu" else recorded if recorded in ("float16", "bfloat16") else "bfloat16"
    if name not in DTYPES:
        raise ValueError(f"dtype {name!r} is not one of auto, {', '.join(DTYPES)}")
    return DTYPES[name]


NEUTRAL = {  # settings of generation_config.json that `generate` does not have -> the values that change nothing
    "repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0, "min_length": 0, "min_new_tokens": 0, "min_p": 0,
    "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "diversity_penalty": 0.0, "num_beam_groups": 1,
    "early_stopping": False, "renormalize_logits": False, "penalty_alpha": 0,
    "bad_words_ids": None, "force_words_ids": None, "forced_bos_token_id": None, "forced_eos_token_id": None,
    "suppress_tokens": None, "begin_suppress_tokens": None, "sequence_bias": None,
    "exponential_decay_length_penalty": None, "guidance_scale": None,
}  # fmt: skip


def eos_token_ids(folder: Path, config: dict) -> list[int]:
    """The ids that end a report; other settings of generation_config.json that would change one warn, once."""
    file = folder / "generation_config.json"
    generation = checkpoint.read_json(file) if file.exists() else {}
    for name, neutral in NEUTRAL.items():
        if generation.get(name) not in (None, neutral):
            warnings.warn(f"{file}: {name} {generation[name]!r} is not applied", stacklevel=2)
    eos = generation.get("eos_token_id")
    eos = config.get("eos_token_id") if eos is None else eos
    return eos if isinstance(eos, list) else [] if eos is None else [eos]
