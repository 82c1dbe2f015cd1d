"""LoRA by hand (Hu et al. 2021): a frozen layer and what is learnt beside it, under PEFT's names."""

import math
from dataclasses import dataclass

import torch
from torch import nn

from decoder import Decoder, recomputed
from plumbing.checkpoint import NameMap


class LoRALinear(nn.Module):
    """base_layer(x) + lora_B(lora_A(dropout(x))) · scale: a frozen layer and what is learnt beside it (Hu et al. 2021).

    Parameters bear PEFT's names; lora_A starts as PEFT's does, lora_B with zeros, which changes nothing.
    """

    def __init__(self, base: nn.Linear, lora_A: nn.Linear, scale: float, dropout: float):
        super().__init__()
        self.base_layer, self.lora_A, self.scale = base, lora_A, scale
        self.lora_B = nn.Linear(lora_A.out_features, base.out_features, bias=False, device=lora_A.weight.device)
        self.dropout = nn.Dropout(dropout)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x):
        low = recomputed(lambda x: self.lora_A(self.dropout(x)), x)
        return self.base_layer(x) + self.lora_B(low * self.scale)  # of the two, the narrow one is scaled

    def merged(self) -> torch.Tensor:
        """The weight of one layer that does the same, in the base layer's type; the sum is made in float32."""
        weight = self.base_layer.weight
        delta = self.lora_B.weight.float() @ self.lora_A.weight.float() * self.scale
        return (weight.float() + delta).to(weight.dtype)


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


LORA_SUPPORTED = dict(  # fields of adapter_config.json that change the result -> the one value we compute with
    peft_type="LORA", bias="none", use_dora=False, fan_in_fan_out=False, lora_bias=False, rank_pattern={},
    alpha_pattern={}, modules_to_save=None, layers_to_transform=None, layer_replication=None, use_qalora=False,
)  # fmt: skip
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def add_lora(decoder: Decoder, names: NameMap, config: LoRAConfig):
    """Wrap the target projections of every layer. Those that a family fuses on disk share their first matrix.

    ValueError where a target is no projection of this family.
    """
    fused = {name: parts for name, parts in names.fused.items() if name in config.target_modules}
    groups = [*fused.values(), *((name,) for name in config.target_modules if name not in fused)]
    known = [*names.fused, *(name for name in PROJECTIONS if name not in sum(names.fused.values(), ()))]
    if unknown := [name for name in config.target_modules if name not in known]:
        raise ValueError(f"LoRA has no target {unknown[0]!r} in this decoder, only {', '.join(known)}")
    for layer in decoder.layers:
        for group in groups:
            lora_A = None
            for name in group:
                block = layer.self_attn if hasattr(layer.self_attn, name) else layer.mlp
                base = getattr(block, name)
                if lora_A is None:
                    lora_A = nn.Linear(base.in_features, config.r, bias=False, device=base.weight.device)
                    nn.init.kaiming_uniform_(lora_A.weight, a=math.sqrt(5))
                setattr(block, name, LoRALinear(base, lora_A, config.scale, config.lora_dropout))
    decoder.requires_grad_(False)
    for parameter in lora_parameters(decoder).values():
        parameter.requires_grad_(True)


def lora_parameters(decoder: Decoder) -> dict[str, nn.Parameter]:
    """LoRA's parameters by name; a matrix that several projections share comes under the name of each."""
    parameters = decoder.named_parameters(remove_duplicate=False)
    return {name: parameter for name, parameter in parameters if ".lora_" in name}


@torch.no_grad()
def merge_lora(decoder: Decoder):
    """Fold LoRA into the layers it stands beside, in place, one layer at a time."""
    for layer in decoder.layers:
        for block in (layer.self_attn, layer.mlp):
            for name, module in list(block.named_children()):
                if isinstance(module, LoRALinear):
                    module.base_layer.weight.copy_(module.merged())
                    setattr(block, name, module.base_layer)
