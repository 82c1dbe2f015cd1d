"""LoRA by hand (Hu et al. 2021): a frozen linear layer and a low-rank update that is learnt beside it.

    y = W x + B (A dropout(x)) · scale         W [out, in] is frozen, A [r, in] and B [out, r] learn

Parameters have PEFT's names, so that adapters load in both directions.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from decoder import Decoder, DecoderLayer, recompute_in_backward
from plumbing.checkpoint import NameMap

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class LoRAConfig:
    """The fields of PEFT's adapter_config.json that we compute with."""

    r: int
    lora_alpha: float
    target_modules: tuple[str, ...]  # modules as the family names them on disk: a fused one counts as one
    lora_dropout: float = 0.0
    use_rslora: bool = False

    @property
    def scale(self) -> float:
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


class LoRALinear(nn.Module):
    """A frozen linear layer and its low-rank update."""

    def __init__(self, base: nn.Linear, lora_A: nn.Linear, scale: float, dropout: float):
        super().__init__()
        self.base_layer = base
        self.lora_A = lora_A
        # zeros: a fresh LoRA changes nothing
        device = lora_A.weight.device
        self.lora_B = nn.Linear(lora_A.out_features, base.out_features, bias=False, device=device)
        nn.init.zeros_(self.lora_B.weight)
        self.dropout = nn.Dropout(dropout)
        self.scale = scale

    def forward(self, x):
        def narrow(x):
            return self.lora_A(self.dropout(x))

        # scale the narrow result [..., r], which is cheaper than the wide one
        low = recompute_in_backward(narrow, x)
        return self.base_layer(x) + self.lora_B(low * self.scale)

    def merged(self) -> torch.Tensor:
        """The weight of one plain layer that does the same. The sum is made in float32."""
        weight = self.base_layer.weight
        A, B = self.lora_A.weight.float(), self.lora_B.weight.float()
        delta = B @ A * self.scale
        return (weight.float() + delta).to(weight.dtype)


def lora_targets(names: NameMap) -> list[str]:
    """Every module of a family that LoRA can be put beside, as named on disk: fused ones, then single projections."""
    inside_fused = [part for parts in names.fused.values() for part in parts]
    return [*names.fused, *(name for name in PROJECTIONS if name not in inside_fused)]


def add_lora(decoder: Decoder, names: NameMap, config: LoRAConfig):
    """Puts LoRA beside the target modules of every layer and freezes the rest of the decoder.

    ValueError where a target is no module of this family.
    """
    known = lora_targets(names)
    for target in config.target_modules:
        if target not in known:
            raise ValueError(f"LoRA has no target {target!r} in this decoder, only {', '.join(known)}")

    # modules that a family fuses on disk share one A, as PEFT has one for the fused module
    groups = [parts for name, parts in names.fused.items() if name in config.target_modules]
    groups += [(name,) for name in config.target_modules if name not in names.fused]
    for layer in decoder.layers:
        for group in groups:
            _wrap(layer, group, config)

    # of the decoder, LoRA alone learns
    decoder.requires_grad_(False)
    for parameter in lora_parameters(decoder).values():
        parameter.requires_grad_(True)


def _wrap(layer: DecoderLayer, group: tuple[str, ...], config: LoRAConfig):
    """Wraps projections of one layer that read the same input with the same A."""
    lora_A = None
    for name in group:
        # the block of the layer that has this projection
        block = layer.self_attn if hasattr(layer.self_attn, name) else layer.mlp
        base = getattr(block, name)
        # all of the group read the same input: the first one's A serves all
        if lora_A is None:
            # PEFT's initial values
            lora_A = nn.Linear(base.in_features, config.r, bias=False, device=base.weight.device)
            nn.init.kaiming_uniform_(lora_A.weight, a=math.sqrt(5))
        setattr(block, name, LoRALinear(base, lora_A, config.scale, config.lora_dropout))


def lora_parameters(decoder: Decoder) -> dict[str, nn.Parameter]:
    """LoRA's parameters by name. A matrix that several projections share is listed under each of their names."""
    parameters = decoder.named_parameters(remove_duplicate=False)
    return {name: parameter for name, parameter in parameters if ".lora_" in name}


@torch.no_grad()
def merge_lora(decoder: Decoder):
    """Adds the updates into the frozen weights, in place, one layer at a time, and removes the wrappers."""
    for layer in decoder.layers:
        for block in (layer.self_attn, layer.mlp):
            for name, module in list(block.named_children()):
                if isinstance(module, LoRALinear):
                    module.base_layer.weight.copy_(module.merged())
                    setattr(block, name, module.base_layer)
