"""The connectors: features of the current and the prior image -> one sequence of image embeddings.

The Temporal Alignment Connector (TAC; Zhang et al., Libra, Findings of ACL 2025, section 3) fuses the encoder's layers
into one, then relates the current image c to the prior p. With L layers of N patches of width C:

    c, p  =  LFE(c), LFE(p)                             three times (layers L -> L//2 -> L//4 -> 1):
                                                            x = x · sigmoid(fc2(gelu(fc1(mean of x over N and C))))
                                                            x = 1×1 convolution over layers, no bias
    p    +=  ((cos(c, p) + 1) / 2)^8 · LFE_prior_bias   cosine of the flattened images; a scalar, 0 at first
    c1    =  norm1(c + cur_self_attention(c))
    p1    =  norm2(p + prior_self_attention(p))
    x     =  norm3(c1 + cros_attention(c1, p1))        query c1; key and value p1
    out   =  mlp_final(norm4(c + mlp_attn(x)))          the residual is c, not c1

For ablations, TAC works without some of its parts. No published checkpoint does.

    without extractor           c, p  =  the encoder's last layer
    without prior_bias          p     =  as the extractor gives it
    without self_attention      c1    =  norm1(c),  p1 = norm2(p)
    without cross_attention     x     =  norm3(c1 + p1)        each place sees the same place of the prior

LLaVA's connectors (linear, mlp2x_gelu) read the current image only. An MLP whose name ends in `_pair` reads each
patch of both images side by side: the plainest connector that sees the prior.
"""

import re
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from attention import attention

# what TAC can do without
TACPart = Literal["extractor", "prior_bias", "self_attention", "cross_attention"]


class TAC(nn.Module):
    """features [B, 2, L, N, C] of (current, prior) -> image embeddings [B, N, hidden]."""

    def __init__(self, num_layers: int, width: int, heads: int, hidden_size: int, without: tuple[TACPart, ...] = ()):
        """num_layers and width are the encoder's, heads (which must divide the width) and hidden_size the decoder's.

        without: parts that are left out, with their parameters.
        """
        super().__init__()
        if width % heads:
            raise ValueError(f"TAC: the decoder's {heads} heads do not divide the encoder's width {width}")

        # layerwise feature extractor: three stages, each a gate and a convolution
        self.LFE_prior_bias = nn.Parameter(torch.zeros(()))
        half, quarter = max(1, num_layers // 2), max(1, num_layers // 4)
        stages = []
        for layers, fewer in [(num_layers, half), (half, quarter), (quarter, 1)]:
            stages.append(SqueezeExcite(layers, fewer))
            stages.append(nn.Conv2d(layers, fewer, 1, bias=False))
        self.LFE = nn.Sequential(*stages)

        # temporal fusion module; `cros` is the published spelling
        self.cur_self_attention = BiasKVAttention(width, heads)
        self.prior_self_attention = BiasKVAttention(width, heads)
        self.cros_attention = BiasKVAttention(width, heads)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.norm3 = nn.LayerNorm(width)
        self.norm4 = nn.LayerNorm(width)
        self.mlp_attn = nn.Sequential(
            nn.Linear(width, width), nn.GELU(), nn.Dropout(0.1),
            nn.Linear(width, width), nn.Dropout(0.1),
        )  # fmt: skip
        self.mlp_final = mlp(4, width, hidden_size)
        self.leave_out(without)

    def leave_out(self, parts: tuple[TACPart, ...]):
        """Replaces parts by what the equations have in their place."""
        if "extractor" in parts:
            self.LFE = None
        if "prior_bias" in parts:
            self.LFE_prior_bias = None
        if "self_attention" in parts:
            self.cur_self_attention = self.prior_self_attention = Nothing()
        if "cross_attention" in parts:
            self.cros_attention = SamePlace()

    @torch.no_grad()
    def start(self, positions, layer_mean: float = 0.0, same_place: float = 0.0, shallow: bool = False):
        """Changes fresh weights; docs/phantom.md, "What TAC needs to start", says why. By default they stay torch's, as
        published.

        positions [N, C]: the encoder's position embeddings of its patches.
        layer_mean: the extractor returns nearly the mean of the layers times this. With torch's values it returns about
            1 % of what it reads, or 0.1 %, or 10 %, as the seed has it.
        same_place: the cross-attention looks at the same place of the prior, the more sharply the larger this is, and
            subtracts what it finds there.
        shallow: the inner two layers of the last MLP pass on what they read, as if it had only the other two. With
            torch's values the prior image makes less than 1 % of what comes out.
        """
        if layer_mean and self.LFE is not None:
            for convolution in self.LFE[1::2]:
                # each layer comes through a gate that is half open
                nn.init.constant_(convolution.weight, 2 / convolution.in_channels)
            self.LFE[-1].weight.mul_(layer_mean)
        if same_place and isinstance(self.cros_attention, BiasKVAttention):
            self.start_at_the_same_place(positions, same_place)
        if shallow:
            first, *inner, _ = self.mlp_final[0::2]
            nn.init.normal_(first.weight, std=first.in_features**-0.5)
            nn.init.zeros_(first.bias)
            for linear in inner:
                # a GELU shrinks small numbers: with this factor 0.2, 0.5, 1 and 2 become 0.19, 0.58, 1.4 and 3
                nn.init.eye_(linear.weight).mul_(1.5)
                nn.init.zeros_(linear.bias)

    def start_at_the_same_place(self, positions, sharpness: float):
        """Fresh weights with which x = norm3(c1 - p1), place by place, as far as the features tell their place."""
        # 1) each head compares the directions in which the places differ most: query · key = sharpness · |projection|²
        places = positions.float()
        directions = torch.linalg.svd(places - places.mean(0), full_matrices=False).Vh  # [min(N, C), C]
        directions = directions[: self.cros_attention.head_dim]  # [D, C]; fewer where there are fewer places
        queries, keys, values = self.cros_attention.in_proj_weight.chunk(3)  # [C, C] each
        for weight in (queries, keys):
            heads = weight.zero_().view(self.cros_attention.num_heads, -1, weight.shape[1])  # [H, D, C]
            heads[:, : len(directions)] = sharpness**0.5 * directions

        # 2) what it finds is subtracted
        nn.init.eye_(values)
        nn.init.eye_(self.cros_attention.out_proj.weight).neg_()
        nn.init.zeros_(self.cros_attention.bias_v)

        # 3) at torch's size, what random weights make of the difference would drown out the current image
        self.mlp_attn[-2].weight.mul_(0.2)

    def forward(self, features):
        current, prior = self.extract(features).unbind(1)  # each [B, N, C]
        return self.fuse(current, prior)

    def extract(self, features):
        """Layerwise feature extractor: features [..., L, N, C] -> [..., N, C].

        A gate scales whole layers and a 1×1 convolution mixes whole layers, so the result is one weighted sum of the L
        layers, and the gates need only their means: two passes over the features, not three per stage.
        """
        if self.LFE is None:
            return features[..., -1, :, :]
        # 1) follow the layers' means through the three stages; each stage is a matrix
        means = features.mean((-2, -1))  # [..., L]
        stages = []
        gates, convolutions = self.LFE[0::2], self.LFE[1::2]
        for gate, convolution in zip(gates, convolutions, strict=True):
            stage = convolution.weight.flatten(1) * gate(means).unsqueeze(-2)  # [..., L_out, L_in]
            means = (stage @ means.unsqueeze(-1)).squeeze(-1)  # [..., L_out]
            stages.append(stage)

        # 2) multiply the stages, and sum the layers with the weights that result
        weights = stages[2] @ (stages[1] @ stages[0])  # [..., 1, L]
        fused = weights @ features.flatten(-2)  # [..., 1, N * C]
        return fused.squeeze(-2).unflatten(-1, features.shape[-2:])  # [..., N, C]

    def fuse(self, c, p):
        """Temporal fusion module: current and prior [B, N, C] -> image embeddings [B, N, hidden]."""
        if self.LFE_prior_bias is not None:
            # a prior that resembles the current image gets more of the learned bias
            # in float32, because the eighth power of a cosine near 1 needs the digits
            current = c.float().flatten(1)  # [B, N * C]
            prior = p.float().flatten(1)
            cosine = F.cosine_similarity(current, prior, dim=1)
            likeness = ((cosine + 1) / 2) ** 8  # [B]
            p = p + likeness.to(p.dtype)[:, None, None] * self.LFE_prior_bias

        # each image attends to itself, then the current image to the prior
        c1 = self.norm1(c + self.cur_self_attention(c, c))
        p1 = self.norm2(p + self.prior_self_attention(p, p))
        x = self.norm3(c1 + self.cros_attention(c1, p1))
        return self.mlp_final(self.norm4(c + self.mlp_attn(x)))


class SqueezeExcite(nn.Module):
    """The gates of L layers, from the layers' means: [..., L] -> [..., L]."""

    def __init__(self, layers: int, squeezed: int):
        super().__init__()
        # convolutions on disk; on means alone they are linear layers
        self.fc1 = nn.Conv2d(layers, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, layers, 1)

    def forward(self, means):
        h = F.linear(means, self.fc1.weight.flatten(1), self.fc1.bias)  # [..., squeezed]
        h = F.gelu(h)
        h = F.linear(h, self.fc2.weight.flatten(1), self.fc2.bias)  # [..., L]
        return torch.sigmoid(h)


class BiasKVAttention(nn.MultiheadAttention):
    """Attention with one learned key and value beside those of the source image, then dropout.

    Torch's module provides the parameters, their names and initial values; `attention` computes.
    """

    def __init__(self, width: int, heads: int):
        super().__init__(width, heads, add_bias_kv=True)
        self.drop = nn.Dropout(0.1)

    def forward(self, query, source):
        """query [B, N, C] attends to source [B, M, C] and to the learned key -> [B, N, C]."""
        weight_q, weight_k, weight_v = self.in_proj_weight.chunk(3)
        bias_q, bias_k, bias_v = self.in_proj_bias.chunk(3)
        q = F.linear(query, weight_q, bias_q)  # [B, N, C]
        k = F.linear(source, weight_k, bias_k)  # [B, M, C]
        v = F.linear(source, weight_v, bias_v)

        # append the learned key and value, the same for every study
        learned_k = self.bias_k.expand(len(k), -1, -1)  # [B, 1, C]
        learned_v = self.bias_v.expand(len(v), -1, -1)
        k = torch.cat((k, learned_k), dim=1)  # [B, M + 1, C]
        v = torch.cat((v, learned_v), dim=1)

        # each head attends for itself
        q = self.split_heads(q)
        k = self.split_heads(k)
        v = self.split_heads(v)
        out = attention(q, k, v).transpose(1, 2)  # [B, N, H, D]
        return self.drop(self.out_proj(out.flatten(2)))

    def split_heads(self, x):  # [B, N, C] -> [B, H, N, D]
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class Nothing(nn.Module):
    """In place of an attention: nothing is added to the query."""

    def forward(self, query, source):
        return torch.zeros_like(query)


class SamePlace(nn.Module):
    """In place of an attention: each place of the query sees the same place of the source."""

    def forward(self, query, source):
        return source


class MLPConnector(nn.Module):
    """features [B, 2, 1, N, C] of (current, prior) -> image embeddings [B, N, hidden]."""

    def __init__(self, projector: nn.Module, images: int = 1):
        """images: 1 reads the current image, 2 reads both. The projector takes patches of width images * C."""
        super().__init__()
        self.images = images
        self.projector = projector

    def forward(self, features):
        patches = features[:, : self.images, 0].transpose(1, 2)  # [B, N, images, C]
        return self.projector(patches.flatten(2))


def mlp(depth: int, width: int, hidden_size: int) -> nn.Sequential:
    """`depth` linear layers with a GELU between each two: [..., width] -> [..., hidden_size]."""
    layers = [nn.Linear(width, hidden_size)]
    for _ in range(1, depth):
        layers += [nn.GELU(), nn.Linear(hidden_size, hidden_size)]
    return nn.Sequential(*layers)


def make_connector(
    kind: str, num_layers: int, width: int, heads: int, hidden_size: int, without: tuple[TACPart, ...] = ()
) -> nn.Module:
    """Returns the connector that `mm_projector_type` names: TAC, linear, mlp2x_gelu, …, mlp2x_gelu_pair, ….

    num_layers and width are those of the selected features, heads and hidden_size the decoder's. without: parts that
    TAC does not have. Raises a ValueError if there is no such connector, or if its sizes do not fit.
    """
    if kind == "TAC":
        return TAC(num_layers, width, heads, hidden_size, without)
    if without:
        raise ValueError(f"mm_projector_type {kind!r} has no {' and no '.join(without)} to leave out: only TAC has")
    name = re.fullmatch(r"linear|mlp(?P<depth>[1-9]\d?)x_gelu(?P<pair>_pair)?", str(kind))
    if not name:
        raise ValueError(f"mm_projector_type {kind!r} is not one of TAC, linear, mlp2x_gelu, …, mlp2x_gelu_pair, …")
    if num_layers != 1:
        raise ValueError(f"mm_projector_type {kind!r} reads one encoder layer: mm_vision_select_layer cannot be 'all'")

    # published names: a linear connector's have no number, those of an MLP of depth 1 have
    if kind == "linear":
        return MLPConnector(nn.Linear(width, hidden_size))
    depth, images = int(name["depth"]), 2 if name["pair"] else 1
    return MLPConnector(mlp(depth, images * width, hidden_size), images)
