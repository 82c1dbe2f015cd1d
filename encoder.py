"""One vision transformer for every image encoder, and what turns an image into its pixels.

A family is a row of FAMILIES: its switches, what its config.json may say, and a map of parameter names. Which one a
folder holds is read from that file. The encoder returns the output of every block, or of one, without the final norm
unless `final_norm` asks for it.
"""

from dataclasses import dataclass, field, fields, replace

import torch
import torch.nn.functional as F
from torch import nn

from attention import attention
from plumbing.checkpoint import NameMap, StoredTensor, rename_tensors


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes bear the names of the encoder's config.json; the switches below them come from FAMILIES."""

    model_type: str
    image_size: int
    patch_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    layer_norm_eps: float
    hidden_act: str
    class_token: bool
    patch_bias: bool
    norm_before: bool
    layer_scale: bool
    final_norm: bool = False  # MAIRA-2's features are normed


@dataclass(frozen=True)
class EncoderFamily:
    switches: dict
    defaults: dict  # what `transformers` takes where config.json is silent
    names: NameMap
    supported: dict = field(default_factory=dict)  # fields that change the result -> the one value we compute with


_CLIP = EncoderFamily(
    switches=dict(class_token=True, patch_bias=False, norm_before=True, layer_scale=False),
    defaults=dict(
        image_size=224, patch_size=32, hidden_size=768, num_hidden_layers=12, num_attention_heads=12,
        intermediate_size=3072, layer_norm_eps=1e-5, hidden_act="quick_gelu",
    ),
    names=NameMap(
        keys=(
            (r"^vision_model\.", ""),
            (r"^embeddings\.patch_embedding\.", "patch_embed."),
            (r"^embeddings\.class_embedding$", "class_token"),
            (r"^embeddings\.position_embedding\.weight$", "position_embeddings"),
            (r"^encoder\.layers\.", "layers."),
            (r"\.layer_norm([12])\.", r".norm\1."),
            (r"\.self_attn\.q_proj\.", ".query."),
            (r"\.self_attn\.k_proj\.", ".key."),
            (r"\.self_attn\.v_proj\.", ".value."),
            (r"\.self_attn\.out_proj\.", ".out."),
            (r"\.mlp\.", "."),
            (r"^pre_layrnorm\.", "norm_before."),
            (r"^post_layernorm\.", "final_norm."),
        ),
        dropped=r"^text_model\.|^(text|visual)_projection\.|^logit_|\.position_ids$|^(vision_model\.)?head\.",
    ),
    supported=dict(num_channels=3),
)  # fmt: skip

FAMILIES = {
    "dinov2": EncoderFamily(
        switches=dict(class_token=True, patch_bias=True, norm_before=False, layer_scale=True),
        defaults=dict(
            image_size=224, patch_size=14, hidden_size=768, num_hidden_layers=12, num_attention_heads=12,
            mlp_ratio=4, layer_norm_eps=1e-6, hidden_act="gelu",
        ),
        names=NameMap(
            keys=(
                (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed."),
                (r"^embeddings\.cls_token$", "class_token"),
                (r"^embeddings\.position_embeddings$", "position_embeddings"),
                (r"^encoder\.layer\.", "layers."),
                (r"\.attention\.attention\.(query|key|value)\.", r".\1."),
                (r"\.attention\.output\.dense\.", ".out."),
                (r"\.mlp\.", "."),
                (r"\.layer_scale([12])\.lambda1$", r".scale\1"),
                (r"^layernorm\.", "final_norm."),
            ),
            dropped=r"^embeddings\.mask_token$",
        ),
        supported=dict(use_swiglu_ffn=False, qkv_bias=True, num_channels=3),
    ),
    "clip_vision_model": _CLIP,
    "siglip_vision_model": replace(
        _CLIP,
        switches=dict(class_token=False, patch_bias=True, norm_before=False, layer_scale=False),
        defaults=_CLIP.defaults | dict(patch_size=16, layer_norm_eps=1e-6, hidden_act="gelu_pytorch_tanh"),
    ),
    "open_clip": EncoderFamily(  # a timm ViT (BiomedCLIP); `_open_clip` finds its sizes
        switches=dict(class_token=True, patch_bias=True, norm_before=False),
        defaults=dict(layer_norm_eps=1e-6, hidden_act="gelu"),
        names=NameMap(
            keys=(
                (r"^module\.visual\.trunk\.", ""),
                (r"^cls_token$", "class_token"),
                (r"^pos_embed$", "position_embeddings"),
                (r"^patch_embed\.proj\.", "patch_embed."),
                (r"^blocks\.", "layers."),
                (r"\.attn\.proj\.", ".out."),
                (r"\.attn\.qkv\.", ".qkv."),
                (r"\.ls([12])\.gamma$", r".scale\1"),
                (r"\.mlp\.", "."),
                (r"^norm\.", "final_norm."),
            ),
            dropped=r"^module\.(text\.|visual\.head\.|logit_)",
            fused={"qkv": ("query", "key", "value")},
        ),
    ),
}  # fmt: skip

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


def encoder_config(config: dict, source, stored: dict[str, StoredTensor], final_norm: bool = False) -> EncoderConfig:
    """A parsed config.json and the tensors beside it -> EncoderConfig.

    CLIP's and SigLIP's may describe a text tower too: their `vision_config` counts. open_clip's (`vision_cfg`) names
    little more than the image's size: the other sizes are those of the tensors. ValueError that names an unsupported
    field.
    """
    where = f"{source}/config.json"
    if isinstance(config.get("vision_config"), dict):
        config = {"model_type": f"{config.get('model_type')}_vision_model"} | config["vision_config"]
    if isinstance(config.get("vision_cfg"), dict):
        config = _open_clip(config["vision_cfg"], source, stored)
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise ValueError(f"{where}: encoder model_type {model_type!r} is not one of {', '.join(FAMILIES)}")
    family = FAMILIES[model_type]
    values = family.defaults | config
    for name, value in family.supported.items():
        if values.get(name, value) != value:
            raise ValueError(f"{where}: {name} {values[name]!r} is not supported, only {value!r}")
    if values["hidden_act"] not in ACTIVATIONS:
        raise ValueError(f"{where}: hidden_act {values['hidden_act']!r} is not one of {', '.join(ACTIVATIONS)}")
    values.setdefault("intermediate_size", int(values["hidden_size"] * values.get("mlp_ratio", 4)))
    values |= family.switches | dict(final_norm=final_norm)
    return EncoderConfig(**{field.name: values[field.name] for field in fields(EncoderConfig)})


def _open_clip(config: dict, source, stored: dict[str, StoredTensor]) -> dict:
    """The sizes of a timm ViT as a config.json of ours would have them."""
    name, size = config.get("timm_model_name"), config.get("image_size")
    shape = lambda name: stored[f"module.visual.trunk.{name}"].shape
    try:
        if not name.startswith("vit_"):
            raise ValueError
        width, _, patch, _ = shape("patch_embed.proj.weight")
        return dict(
            model_type="open_clip", image_size=int(size), patch_size=patch, hidden_size=width,
            num_attention_heads=width // 64,  # as in every ViT that open_clip trains
            num_hidden_layers=sum(key.endswith(".attn.qkv.weight") for key in stored),
            intermediate_size=shape("blocks.0.mlp.fc1.weight")[0],
            layer_scale="module.visual.trunk.blocks.0.ls1.gamma" in stored,
        )  # fmt: skip
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError(f"{source}: timm_model_name {name!r} with image_size {size!r} is not a ViT we know") from None


def encoder_tensors(encoder: "Encoder", stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Tensors by their names on disk -> by our parameters' names; those that take no part are left out."""
    tensors = rename_tensors(stored, FAMILIES[encoder.config.model_type].names, encoder)
    return {name: t for name, t in tensors.items() if encoder.config.final_norm or not name.startswith("final_norm.")}


class Encoder(nn.Module):
    """pixels [B, 3, S, S] -> features [B, L, N, C], the output of every block, or of one."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config = config
        C = config.hidden_size
        if config.class_token:
            self.class_token = nn.Parameter(torch.zeros(1, 1, C))
        positions = (config.image_size // config.patch_size) ** 2 + config.class_token
        self.position_embeddings = nn.Parameter(torch.zeros(1, positions, C))
        self.patch_embed = nn.Conv2d(3, C, config.patch_size, config.patch_size, bias=config.patch_bias)
        if config.norm_before:
            self.norm_before = nn.LayerNorm(C, config.layer_norm_eps)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_hidden_layers))
        if config.final_norm:
            self.final_norm = nn.LayerNorm(C, config.layer_norm_eps)

    def forward(self, pixels, select_layer: str | int = "all", select_feature: str = "patch"):
        """select_layer "all": every block's output; a number: that one, with L + 1 counted from the embeddings
        as published (-2: the last but one). select_feature "patch" drops the class token, "cls_patch" keeps it.
        """
        x = self.patch_embed(pixels)  # [B, C, S / P, S / P]
        positions = self._positions(x.shape[2:])
        x = x.flatten(2).transpose(1, 2)  # [B, N, C]
        if self.config.class_token:
            x = torch.cat((self.class_token.expand(len(x), -1, -1), x), 1)
        x = x + positions
        if self.config.norm_before:
            x = self.norm_before(x)
        first = int(self.config.class_token and select_feature == "patch")
        depth = len(self.layers) if select_layer == "all" else range(len(self.layers) + 1)[select_layer]
        outputs = []
        for layer in self.layers[:depth]:
            x = layer(x)
            if select_layer == "all":
                outputs.append(x[:, first:])
        features = torch.stack(outputs or [x[:, first:]], 1)  # [B, L, N, C]
        return self.final_norm(features) if self.config.final_norm else features

    def _positions(self, grid):
        """The position embeddings of a grid of patches; bicubic in between where it is not the trained one."""
        trained = self.config.image_size // self.config.patch_size
        if tuple(grid) == (trained, trained):
            return self.position_embeddings
        first = int(self.config.class_token)
        image = self.position_embeddings[:, first:].unflatten(1, (trained, trained)).permute(0, 3, 1, 2).float()
        image = F.interpolate(image, tuple(grid), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
        return torch.cat((self.position_embeddings[:, :first], image.to(self.position_embeddings.dtype)), 1)


class EncoderLayer(nn.Module):
    def __init__(self, config: EncoderConfig):
        super().__init__()
        C = config.hidden_size
        self.heads = config.num_attention_heads
        self.activation = ACTIVATIONS[config.hidden_act]
        self.norm1 = nn.LayerNorm(C, config.layer_norm_eps)
        self.query, self.key, self.value, self.out = (nn.Linear(C, C) for _ in range(4))
        self.norm2 = nn.LayerNorm(C, config.layer_norm_eps)
        self.fc1 = nn.Linear(C, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, C)
        self.scale1 = nn.Parameter(torch.ones(C)) if config.layer_scale else 1.0
        self.scale2 = nn.Parameter(torch.ones(C)) if config.layer_scale else 1.0

    def forward(self, x):  # [B, N, C]
        h = self.norm1(x)
        q, k, v = (
            project(h).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, H, N, D]
            for project in (self.query, self.key, self.value)
        )
        x = x + self.out(attention(q, k, v).transpose(1, 2).flatten(2)) * self.scale1
        return x + self.fc2(self.activation(self.fc1(self.norm2(x)))) * self.scale2
