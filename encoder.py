"""One vision transformer (ViT; Dosovitskiy et al. 2021) for every image encoder.

DINOv2, CLIP, SigLIP and the timm ViT in BiomedCLIP differ in a few switches. A family is a row of FAMILIES: its
switches, its defaults, and a map from the parameter names on disk to ours. Which family a folder holds is read from its
config.json. To add an encoder, add a row.

The encoder returns the output of every block, or of one block. There is no final norm, unless `final_norm` asks for it.
"""

import re
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import nn

from attention import attention
from plumbing.checkpoint import NameMap, StoredTensor, rename_tensors
from plumbing.fields import Range, Size, check_fields, check_present, check_value, misfit, shorten, warn_of_training


@dataclass(frozen=True)
class EncoderConfig:
    """The sizes of one encoder and the switches of its family."""

    # sizes bear their names in the encoder's config.json
    model_type: str
    image_size: Annotated[int, Range(1, 4096)]
    patch_size: Annotated[int, Range(1, 4096)]
    hidden_size: Size
    num_hidden_layers: Annotated[int, Range(1, 1000)]
    num_attention_heads: Annotated[int, Range(1, 4096)]
    intermediate_size: Size
    layer_norm_eps: Annotated[float, Range(1e-12, 1)]
    hidden_act: Literal["gelu", "gelu_pytorch_tanh", "quick_gelu"]

    # switches, from FAMILIES
    class_token: bool
    patch_bias: bool  # whether the patch embedding has a bias
    norm_before: bool  # a norm between the embeddings and the first block
    layer_scale: bool  # a learned factor per channel after each half of a block
    final_norm: bool = False  # MAIRA-2 reads normed features, every other model reads them as the blocks return them


@dataclass(frozen=True)
class EncoderFamily:
    names: NameMap
    switches: dict
    defaults: dict  # the fields that the family reads -> what `transformers` takes where config.json is silent
    supported: dict = field(default_factory=dict)  # fields that would change the result -> what they may be


# layers.0 of DINOv2 on disk: encoder.layer.0.attention.attention.query.weight -> layers.0.query.weight
DINOV2_NAMES = NameMap(
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
    # the mask token serves DINOv2's own training only
    dropped=r"^embeddings\.mask_token$",
)

# CLIP and SigLIP: vision_model.encoder.layers.0.self_attn.q_proj.weight -> layers.0.query.weight
CLIP_NAMES = NameMap(
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
        (r"^pre_layrnorm\.", "norm_before."),  # the published spelling
        (r"^post_layernorm\.", "final_norm."),
    ),
    # a checkpoint may hold a text tower, and SigLIP has a pooling head
    dropped=r"^text_model\.|^(text|visual)_projection\.|^logit_|\.position_ids$|^(vision_model\.)?head\.",
)

# open_clip's trainer with a timm ViT: module.visual.trunk.blocks.0.attn.qkv.weight -> rows of layers.0.query.weight, …
TIMM_NAMES = NameMap(
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
    # the text tower, the projection into the space of texts, the temperature
    dropped=r"^module\.(text\.|visual\.head\.|logit_)",
    fused={"qkv": ("query", "key", "value")},
)

# three channels, and no settings of single layers
SUPPORTED = dict(num_channels=Annotated[int, Range(3, 3)], per_layer_config=type(None))
# what `transformers` assumes for the first three: the sizes of a ViT-Base
BASE = dict(image_size=224, hidden_size=768, num_hidden_layers=12, num_attention_heads=12)

FAMILIES = {
    "dinov2": EncoderFamily(
        names=DINOV2_NAMES,
        switches=dict(class_token=True, patch_bias=True, norm_before=False, layer_scale=True),
        defaults=dict(BASE, patch_size=14, mlp_ratio=4, layer_norm_eps=1e-6, hidden_act="gelu"),
        supported=SUPPORTED | dict(use_swiglu_ffn=Literal[False], qkv_bias=Literal[True]),
    ),
    "clip_vision_model": EncoderFamily(
        names=CLIP_NAMES,
        switches=dict(class_token=True, patch_bias=False, norm_before=True, layer_scale=False),
        defaults=dict(BASE, patch_size=32, intermediate_size=3072, layer_norm_eps=1e-5, hidden_act="quick_gelu"),
        supported=SUPPORTED,
    ),
    "siglip_vision_model": EncoderFamily(
        names=CLIP_NAMES,
        switches=dict(class_token=False, patch_bias=True, norm_before=False, layer_scale=False),
        defaults=dict(BASE, patch_size=16, intermediate_size=3072, layer_norm_eps=1e-6, hidden_act="gelu_pytorch_tanh"),
        supported=SUPPORTED,
    ),
    # BiomedCLIP; `_open_clip_sizes` reads the sizes and layer_scale off the tensors
    "open_clip": EncoderFamily(
        names=TIMM_NAMES,
        switches=dict(class_token=True, patch_bias=True, norm_before=False),
        defaults=dict(layer_norm_eps=1e-6, hidden_act="gelu"),
    ),
}
# what training of `transformers` drops at random, and we do not
DROPOUTS = ("attention_dropout", "attention_probs_dropout_prob", "hidden_dropout_prob", "drop_path_rate")

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


def encoder_config(config: dict, source, stored: dict[str, StoredTensor], final_norm: bool = False) -> EncoderConfig:
    """Turns a parsed config.json into an EncoderConfig.

    stored: the tensors beside it; only an open_clip checkpoint needs them, because its config.json holds few sizes.
    Raises a ValueError that names a field whose value is not supported.
    """
    where = f"{source}/config.json"
    # 1) find the description of the image encoder; a file may describe a text tower as well
    sizes = {}
    if isinstance(config.get("vision_config"), dict):
        # "clip" becomes "clip_vision_model", the type of a CLIP that is stored without its text tower
        model_type = f"{config.get('model_type')}_vision_model"
        described = config["vision_config"]
        # CLIP's first files describe it twice, and `transformers` takes this one
        if model_type == "clip_vision_model" and config.get("vision_config_dict") is not None:
            described = check_value(config["vision_config_dict"], dict, "vision_config_dict", where)
        config = {"model_type": model_type} | described
    elif isinstance(config.get("vision_cfg"), dict):
        config = sizes = _open_clip_sizes(config["vision_cfg"], source, stored)

    # 2) find its family
    model_type = check_value(config.get("model_type"), str | None, "model_type", where)
    if model_type not in FAMILIES:
        raise ValueError(f"{where}: encoder model_type {shorten(model_type)} is not one of {', '.join(FAMILIES)}")
    family = FAMILIES[model_type]

    # 3) what the family reads, in its types and bounds; refuse what we would compute wrongly
    values = {name: config.get(name, default) for name, default in family.defaults.items()} | sizes
    mlp_ratio = values.get("mlp_ratio")
    values = check_fields(values | {"model_type": model_type}, EncoderConfig, where)
    check_present(config, family.supported, where)
    warn_of_training(config, DROPOUTS, where)
    if "mlp_ratio" in family.defaults:
        mlp_ratio = check_value(mlp_ratio, Annotated[float, Range(0.01, 100)], "mlp_ratio", where)
        width = int(values["hidden_size"] * mlp_ratio)
        values["intermediate_size"] = check_value(width, Size, "hidden_size times mlp_ratio", where)

    # 4) sizes that fit each other
    if values["hidden_size"] % values["num_attention_heads"]:
        expected = f"a divisor of hidden_size {values['hidden_size']}"
        raise misfit(values["num_attention_heads"], "num_attention_heads", where, expected)
    if values["image_size"] < values["patch_size"]:
        raise misfit(values["patch_size"], "patch_size", where, f"at most image_size {values['image_size']}")
    return EncoderConfig(**values | family.switches, final_norm=bool(final_norm))


def _open_clip_sizes(vision_cfg: dict, source, stored: dict[str, StoredTensor]) -> dict:
    """Returns what config.json would say about a timm ViT, as the shapes of its tensors tell.

    vision_cfg names the architecture and the size of the image, no more.
    """
    name, image_size = vision_cfg.get("timm_model_name"), vision_cfg.get("image_size")
    # other names have another activation, register tokens, no class token, or (huge) wider heads
    is_plain = re.fullmatch(r"vit_(tiny|small|base|large)_patch\d+_(\d+|dinov2)(\.\w+)?", str(name)[:80])
    shapes = {key.removeprefix("module.visual.trunk."): tensor.shape for key, tensor in stored.items()}
    has_vit = "patch_embed.proj.weight" in shapes and "blocks.0.mlp.fc1.weight" in shapes
    if not (has_vit and is_plain):
        raise ValueError(f"{source}: timm_model_name {shorten(name)} is not a ViT we know")

    width, _, patch_size, _ = shapes["patch_embed.proj.weight"]  # [C, 3, P, P]
    intermediate_size, _ = shapes["blocks.0.mlp.fc1.weight"]
    return dict(
        model_type="open_clip", image_size=image_size, patch_size=patch_size,
        hidden_size=width, intermediate_size=intermediate_size,
        num_hidden_layers=sum(key.endswith(".attn.qkv.weight") for key in shapes),
        num_attention_heads=max(width // 64, 1),  # as in every ViT of these names
        layer_scale="blocks.0.ls1.gamma" in shapes,
    )  # fmt: skip


def encoder_tensors(encoder: "Encoder", stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Rename tensors from their names on disk to our parameters' names, and leave out those that take no part."""
    tensors = rename_tensors(stored, FAMILIES[encoder.config.model_type].names, encoder)
    if not encoder.config.final_norm:
        # every file has a final norm, but few models use it
        tensors.pop("final_norm.weight", None)
        tensors.pop("final_norm.bias", None)
    return tensors


class Encoder(nn.Module):
    """pixels [B, 3, S, S] -> features [B, L, N, C]: N patches of width C, from L blocks."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config = config
        C, P = config.hidden_size, config.patch_size

        # embeddings: the class token where the family has one, then one per patch
        if config.class_token:
            self.class_token = nn.Parameter(torch.zeros(1, 1, C))
        positions = (config.image_size // P) ** 2 + config.class_token
        self.position_embeddings = nn.Parameter(torch.zeros(1, positions, C))
        self.patch_embed = nn.Conv2d(3, C, kernel_size=P, stride=P, bias=config.patch_bias)
        if config.norm_before:
            self.norm_before = nn.LayerNorm(C, config.layer_norm_eps)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_hidden_layers))
        if config.final_norm:
            self.final_norm = nn.LayerNorm(C, config.layer_norm_eps)

    def forward(self, pixels, select_layer: str | int = "all", select_feature: str = "patch"):
        """pixels [B, 3, S, S] -> features [B, L, N, C].

        select_layer: "all" returns the output of every block. A number returns one layer (L = 1), counted as published:
        0 is the embeddings, 1, 2, … are the blocks, and -2 is the last block but one.
        select_feature: "patch" drops the class token, "cls_patch" keeps it: N is one more then.
        """
        # 1) cut the image into patches: each becomes one position
        x = self.patch_embed(pixels)  # [B, C, S / P, S / P]
        positions = self._positions(*x.shape[2:])
        x = x.flatten(2).transpose(1, 2)  # [B, N, C]
        if self.config.class_token:
            class_token = self.class_token.expand(len(x), -1, -1)  # [B, 1, C]
            x = torch.cat((class_token, x), dim=1)  # [B, 1 + N, C]
        x = x + positions
        if self.config.norm_before:
            x = self.norm_before(x)

        # 2) run the blocks, no more than the selection needs: -2 of 12 blocks ends at block 11
        depth = len(self.layers)
        if select_layer != "all":
            depth = range(depth + 1)[select_layer]
        outputs = []
        for layer in self.layers[:depth]:
            x = layer(x)
            # keep an output only if it is returned: twelve of them are large
            if select_layer == "all":
                outputs.append(x)

        # 3) select and stack
        selected = outputs if select_layer == "all" else [x]
        if self.config.class_token and select_feature == "patch":
            selected = [h[:, 1:] for h in selected]
        features = torch.stack(selected, dim=1)  # [B, L, N, C]
        return self.final_norm(features) if self.config.final_norm else features

    def split_positions(self):
        """Returns the position embeddings of the class token, [1, 0 or 1, C], and those of the patches, [1, N, C]."""
        return self.position_embeddings.tensor_split([int(self.config.class_token)], dim=1)

    def _positions(self, rows: int, columns: int):
        """Returns the position embeddings of a grid of patches, [1, N, C].

        If it is not the grid of the trained image size, they are interpolated, bicubic and in float32.
        """
        side = self.config.image_size // self.config.patch_size
        if (rows, columns) == (side, side):
            return self.position_embeddings

        # the class token has no place in the grid: set its embedding aside
        class_position, grid = self.split_positions()
        grid = grid.unflatten(1, (side, side)).permute(0, 3, 1, 2)  # [1, C, side, side]
        grid = F.interpolate(grid.float(), (rows, columns), mode="bicubic", align_corners=False)
        grid = grid.flatten(2).transpose(1, 2)  # [1, rows * columns, C]
        return torch.cat((class_position, grid.to(class_position.dtype)), dim=1)


class EncoderLayer(nn.Module):
    """One block, [B, N, C] -> [B, N, C]: attention among all patches, then an MLP in each."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        C = config.hidden_size
        self.heads = config.num_attention_heads
        self.activation = ACTIVATIONS[config.hidden_act]
        self.norm1 = nn.LayerNorm(C, config.layer_norm_eps)
        self.query = nn.Linear(C, C)
        self.key = nn.Linear(C, C)
        self.value = nn.Linear(C, C)
        self.out = nn.Linear(C, C)
        self.norm2 = nn.LayerNorm(C, config.layer_norm_eps)
        self.fc1 = nn.Linear(C, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, C)
        # a family without layer scale multiplies by 1
        self.scale1 = nn.Parameter(torch.ones(C)) if config.layer_scale else 1.0
        self.scale2 = nn.Parameter(torch.ones(C)) if config.layer_scale else 1.0

    def forward(self, x):
        # 1) attention without a mask: every patch sees every patch
        h = self.norm1(x)
        split_heads = lambda y: y.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, N, C] -> [B, H, N, D]
        q = split_heads(self.query(h))
        k = split_heads(self.key(h))
        v = split_heads(self.value(h))
        h = attention(q, k, v).transpose(1, 2).flatten(2)  # [B, N, C]
        x = x + self.out(h) * self.scale1

        # 2) MLP, patch by patch
        h = self.activation(self.fc1(self.norm2(x)))
        return x + self.fc2(h) * self.scale2
