"""One vision transformer for every image encoder, and what turns an image into its pixels.

A family is a row of switches and a map of parameter names; which one a folder holds is read from its
`config.json`. The encoder returns the output of every block: neither the embeddings nor the final norm.
"""

import re
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from attention import attention


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
    class_token: bool
    patch_bias: bool
    norm_before: bool
    layer_scale: bool
    activation: str

    @property
    def num_patches(self):
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class Family:
    switches: dict
    defaults: dict  # what `transformers` takes where config.json is silent
    supported: dict  # fields of config.json that change the result -> the one value we compute with
    keys: tuple  # (regular expression, replacement): parameter names on disk -> ours
    dropped: str  # a regular expression: tensors on disk that take no part


FAMILIES = {
    "dinov2": Family(
        switches=dict(class_token=True, patch_bias=True, norm_before=False, layer_scale=True, activation="gelu"),
        defaults=dict(
            image_size=224, patch_size=14, hidden_size=768, num_hidden_layers=12, num_attention_heads=12,
            mlp_ratio=4, layer_norm_eps=1e-6,
        ),
        supported=dict(hidden_act="gelu", use_swiglu_ffn=False, qkv_bias=True, num_channels=3),
        keys=(
            (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed."),
            (r"^embeddings\.cls_token$", "class_token"),
            (r"^embeddings\.position_embeddings$", "position_embeddings"),
            (r"^encoder\.layer\.", "layers."),
            (r"\.attention\.attention\.(query|key|value)\.", r".\1."),
            (r"\.attention\.output\.dense\.", ".out."),
            (r"\.mlp\.", "."),
            (r"\.layer_scale([12])\.lambda1$", r".scale\1"),
        ),
        dropped=r"^embeddings\.mask_token$|^layernorm\.",
    ),
}  # fmt: skip

ACTIVATIONS = {"gelu": F.gelu}


def encoder_config(config: dict, source) -> EncoderConfig:
    """A parsed config.json -> EncoderConfig; ValueError that names the field where a value is not supported."""
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise ValueError(f"{source}/config.json: encoder model_type {model_type!r} is not one of {', '.join(FAMILIES)}")
    family = FAMILIES[model_type]
    for name, value in family.supported.items():
        if config.get(name, value) != value:
            raise ValueError(f"{source}/config.json: {name} {config[name]!r} is not supported, only {value!r}")
    values = family.defaults | config
    values.setdefault("intermediate_size", int(values["hidden_size"] * values.get("mlp_ratio", 4)))
    values |= family.switches
    return EncoderConfig(**{field.name: values[field.name] for field in fields(EncoderConfig)})


def encoder_names(config: EncoderConfig, names) -> dict[str, str]:
    """Our parameter name -> the name on disk; tensors that take no part are left out."""
    family = FAMILIES[config.model_type]
    renamed = {}
    for name in names:
        if not re.search(family.dropped, name):
            ours = name
            for pattern, replacement in family.keys:
                ours = re.sub(pattern, replacement, ours)
            renamed[ours] = name
    return renamed


class Encoder(nn.Module):
    """pixels [B, 3, S, S] -> features [B, L, N, C], the output of every block, or of one."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config = config
        C = config.hidden_size
        if config.class_token:
            self.class_token = nn.Parameter(torch.zeros(1, 1, C))
        self.position_embeddings = nn.Parameter(torch.zeros(1, config.num_patches + config.class_token, C))
        self.patch_embed = nn.Conv2d(3, C, config.patch_size, config.patch_size, bias=config.patch_bias)
        if config.norm_before:
            self.norm_before = nn.LayerNorm(C, config.layer_norm_eps)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, pixels, select_layer: str | int = "all", select_feature: str = "patch"):
        """select_layer "all": every block's output; a number: that one, with L + 1 counted from the embeddings
        as published (-2: the last but one). select_feature "patch" drops the class token, "cls_patch" keeps it.
        """
        x = self.patch_embed(pixels).flatten(2).transpose(1, 2)  # [B, N, C]
        if self.config.class_token:
            x = torch.cat((self.class_token.expand(len(x), -1, -1), x), 1)
        x = x + self.position_embeddings
        if self.config.norm_before:
            x = self.norm_before(x)
        first = int(self.config.class_token and select_feature == "patch")
        depth = len(self.layers) if select_layer == "all" else range(len(self.layers) + 1)[select_layer]
        outputs = []
        for layer in self.layers[:depth]:
            x = layer(x)
            if select_layer == "all":
                outputs.append(x[:, first:])
        return torch.stack(outputs or [x[:, first:]], 1)  # [B, L, N, C]


class EncoderLayer(nn.Module):
    def __init__(self, config: EncoderConfig):
        super().__init__()
        C = config.hidden_size
        self.heads = config.num_attention_heads
        self.activation = ACTIVATIONS[config.activation]
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


# -------------------------------------------------------------------------------------------- pixels


@dataclass(frozen=True)
class PixelConfig:
    """How an image becomes pixels, from `preprocessor_config.json`; pad is ours."""

    size: int  # the shortest edge is resized to it
    crop: int  # side of the centre crop
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float  # 1 / 255
    pad: str  # "mean" or "black": pad to a square first; "none"


def pixel_config(config: dict, source, pad: str) -> PixelConfig:
    """A parsed preprocessor_config.json -> PixelConfig; ValueError that names an unsupported field."""
    supported = dict(do_resize=True, do_center_crop=True, do_rescale=True, do_normalize=True, resample=3)
    where = f"{source}/preprocessor_config.json"
    for name, value in supported.items():
        if config.get(name, value) != value:
            raise ValueError(f"{where}: {name} {config[name]!r} is not supported, only {value!r}")
    size, crop = config.get("size"), config.get("crop_size")
    if not isinstance(size, dict) or "shortest_edge" not in size or not isinstance(crop, dict):
        raise ValueError(f"{where}: size {size!r} with crop_size {crop!r} is not supported")
    if crop.get("height") is None or crop.get("height") != crop.get("width") or size["shortest_edge"] < crop["height"]:
        raise ValueError(f"{where}: crop_size {crop!r} is no square within size {size!r}")
    if lacking := [name for name in ("image_mean", "image_std") if name not in config]:
        raise ValueError(f"{where} lacks {' and '.join(lacking)}")
    mean, std = config["image_mean"], config["image_std"]
    scale = config.get("rescale_factor", 1 / 255)
    return PixelConfig(size["shortest_edge"], crop["height"], tuple(mean), tuple(std), scale, pad)


def preprocess(image: Image.Image, config: PixelConfig) -> torch.Tensor:
    """A PIL image in mode RGB -> pixels [3, S, S]."""
    return normalise(frame(image, config), config)


def frame(image: Image.Image, config: PixelConfig) -> np.ndarray:
    """A PIL image in mode RGB -> uint8 [S, S, 3], what the encoder will see: pad to a square, bicubic resize, crop."""
    if config.pad != "none" and image.width != image.height:
        colour = tuple(int(255 * mean) for mean in config.mean) if config.pad == "mean" else (0, 0, 0)
        side = max(image.size)
        square = Image.new("RGB", (side, side), colour)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = square
    short, long = sorted(image.size)
    long = int(config.size * long / short)
    size = (config.size, long) if image.width <= image.height else (long, config.size)
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = ((side - config.crop) // 2 for side in size)
    return np.array(image.crop((left, top, left + config.crop, top + config.crop)))


def normalise(frame: np.ndarray, config: PixelConfig) -> torch.Tensor:
    """uint8 [S, S, 3] -> pixels [3, S, S], float32."""
    pixels = torch.from_numpy(frame).permute(2, 0, 1)  # [3, S, S]
    pixels = (pixels.double() * config.scale).float()  # published: rescaled in float64, normalised in float32
    return (pixels - torch.tensor(config.mean)[:, None, None]) / torch.tensor(config.std)[:, None, None]
