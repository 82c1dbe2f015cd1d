"""The connector: encoder layers of two images -> one sequence of image embeddings.

The Temporal Alignment Connector (TAC; Zhang et al., Libra, Findings of ACL 2025, section 3): a layerwise feature
extractor (LFE) fuses the encoder's layers into one, a temporal fusion module (TFM) relates the current image to the
prior one. Parameters bear the published names. The MLP connectors, LLaVA's, look at the current image alone; with
`_pair` behind their name they take each patch of both images side by side, the plainest thing that sees the prior.
"""

import re

import torch
import torch.nn.functional as F
from torch import nn

from attention import attention


class TAC(nn.Module):
    """features [B, 2, L, N, C], of (current, prior) -> image embeddings [B, N, hidden]."""

    def __init__(self, num_layers: int, width: int, heads: int, hidden_size: int):
        """heads: the decoder's. ValueError where they do not divide the width."""
        super().__init__()
        if width % heads:
            raise ValueError(f"TAC: the decoder's {heads} heads do not divide the encoder's width {width}")
        half, quarter = max(1, num_layers // 2), max(1, num_layers // 4)
        self.LFE_prior_bias = nn.Parameter(torch.zeros(()))
        self.LFE = nn.Sequential(
            SqueezeExcite(num_layers, half), nn.Conv2d(num_layers, half, 1, bias=False),
            SqueezeExcite(half, quarter), nn.Conv2d(half, quarter, 1, bias=False),
            SqueezeExcite(quarter, 1), nn.Conv2d(quarter, 1, 1, bias=False),
        )  # fmt: skip
        self.cur_self_attention = BiasedAttention(width, heads)
        self.prior_self_attention = BiasedAttention(width, heads)
        self.cros_attention = BiasedAttention(width, heads)
        self.norm1, self.norm2, self.norm3, self.norm4 = (nn.LayerNorm(width) for _ in range(4))
        self.mlp_attn = nn.Sequential(
            nn.Linear(width, width), nn.GELU(), nn.Dropout(0.1), nn.Linear(width, width), nn.Dropout(0.1)
        )
        self.mlp_final = nn.Sequential(
            nn.Linear(width, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size), nn.GELU(),
            nn.Linear(hidden_size, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size),
        )  # fmt: skip
        self.dropout = nn.Dropout(0.1)

    def forward(self, features):
        return self.fuse(*self.extract(features).unbind(1))

    def extract(self, features):
        """Layerwise feature extractor: features [..., L, N, C] -> [..., N, C].

        Each squeeze-and-excite gate scales whole layers and each 1×1 convolution mixes whole layers, so given the
        gates the extractor is one weighted sum of the L layers, and the gates need the layers' means alone: two
        passes over the features, where computing it as written takes nine (test_tac keeps that version).
        """
        mean = features.mean((-2, -1))  # [..., L]
        mix = None  # [..., L', L]: this many outputs as sums of the L layers
        for gate, convolution in zip(self.LFE[0::2], self.LFE[1::2], strict=True):
            step = convolution.weight[:, :, 0, 0] * gate(mean)[..., None, :]
            mix = step if mix is None else step @ mix
            mean = (step @ mean[..., None])[..., 0]
        return (mix @ features.flatten(-2)).view(*features.shape[:-3], *features.shape[-2:])

    def fuse(self, c, p):
        """Temporal fusion module: c, p [B, N, C] -> image embeddings [B, N, hidden]."""
        # in float32: the eighth power of a cosine near 1 has nothing to spare
        cosine = F.cosine_similarity(c.float().flatten(1), p.float().flatten(1), dim=1)
        p = p + (((cosine + 1) / 2) ** 8).to(p.dtype)[:, None, None] * self.LFE_prior_bias
        c1 = self.norm1(c + self.dropout(self.cur_self_attention(c, c)))
        p1 = self.norm2(p + self.dropout(self.prior_self_attention(p, p)))
        x = self.norm3(c1 + self.dropout(self.cros_attention(c1, p1)))
        return self.mlp_final(self.norm4(c + self.mlp_attn(x)))


class MLPConnector(nn.Module):
    """features [B, 2, 1, N, C], of (current, prior) -> image embeddings [B, N, hidden]; images: 1 current, 2 both."""

    def __init__(self, depth: int, width: int, hidden_size: int, linear: bool, images: int = 1):
        super().__init__()
        self.images = images
        layers = [nn.Linear(images * width, hidden_size)]
        for _ in range(1, depth):
            layers += [nn.GELU(), nn.Linear(hidden_size, hidden_size)]
        self.projector = layers[0] if linear else nn.Sequential(*layers)  # published: no number in a linear one's names

    def forward(self, features):
        return self.projector(features[:, : self.images, 0].transpose(1, 2).flatten(2))  # of [B, N, images * C]


def make_connector(kind: str, num_layers: int, width: int, heads: int, hidden_size: int) -> nn.Module:
    """The connector that `mm_projector_type` names; ValueError where there is none, or its sizes do not fit.

    num_layers and width: the encoder's, as selected; heads and hidden_size: the decoder's.
    """
    if kind == "TAC":
        return TAC(num_layers, width, heads, hidden_size)
    found = re.fullmatch(r"linear|mlp([1-9]\d*)x_gelu(_pair)?", str(kind))
    if not found:
        raise ValueError(f"mm_projector_type {kind!r} is not one of TAC, linear, mlp2x_gelu, …, mlp2x_gelu_pair, …")
    if num_layers != 1:
        raise ValueError(f"mm_projector_type {kind!r} reads one encoder layer: mm_vision_select_layer cannot be 'all'")
    return MLPConnector(int(found[1] or 1), width, hidden_size, kind == "linear", images=2 if found[2] else 1)


class SqueezeExcite(nn.Module):
    """The gate of each layer, from the layers' means: [..., L] -> [..., L]."""

    def __init__(self, layers: int, squeezed: int):
        super().__init__()
        self.fc1 = nn.Conv2d(layers, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, layers, 1)

    def forward(self, mean):
        h = F.gelu(F.linear(mean, self.fc1.weight[:, :, 0, 0], self.fc1.bias))
        return torch.sigmoid(F.linear(h, self.fc2.weight[:, :, 0, 0], self.fc2.bias))


class BiasedAttention(nn.Module):
    """nn.MultiheadAttention with `add_bias_kv`, its names and its initial values: one learned extra key and value."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.bias_k = nn.Parameter(torch.empty(1, 1, width))
        self.bias_v = nn.Parameter(torch.empty(1, 1, width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.xavier_normal_(self.bias_k)
        nn.init.xavier_normal_(self.bias_v)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, query, source):
        """query [B, N, C] attends to source [B, M, C] and to the extra key: [B, N, C]."""
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q = F.linear(query, weights[0], biases[0])
        k = torch.cat((F.linear(source, weights[1], biases[1]), self.bias_k.expand(len(source), -1, -1)), 1)
        v = torch.cat((F.linear(source, weights[2], biases[2]), self.bias_v.expand(len(source), -1, -1)), 1)
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))  # [B, H, N, D]
        return self.out_proj(attention(q, k, v).transpose(1, 2).flatten(2))
