"""LoRA by hand (Hu et al. 2021): a frozen linear layer and a low-rank update that is learnt beside it.

    y = W x + B (A dropout(x)) · scale         W [out, in] is frozen, A [r, in] and B [out, r] learn

Parameters have PEFT's names, so that adapters load in both directions.
"""

import math
import re
from dataclasses import dataclass, field
from typing import Annotated

import torch
from torch import nn

from decoder import Decoder, recompute_in_backward
from plumbing.checkpoint import NameMap
from plumbing.fields import Range, Size

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
PROJECTIONS = (*ATTENTION, "gate_proj", "up_proj", "down_proj")

Alpha = Annotated[float, Range(-1e6, 1e6)]
Patterns = tuple[str, ...] | str | None


@dataclass(frozen=True)
class LoRAConfig:
    """The fields of PEFT's adapter_config.json that we compute with.

    A module is named as on disk, model.layers.0.self_attn.q_proj; one that a family fuses counts as one. A list of
    names also matches the ends of names; a text is a regular expression for whole names.
    """

    r: Size = 8
    lora_alpha: Alpha = 8.0
    target_modules: Patterns = None
    lora_dropout: Annotated[float, Range(0, 1)] = 0.0
    use_rslora: bool = False
    exclude_modules: Patterns = None
    layers_to_transform: tuple[int, ...] | int | None = None
    layers_pattern: Patterns = None  # names of the lists of layers that layers_to_transform counts in
    rank_pattern: dict[str, Size] = field(default_factory=dict)  # pattern of a module's name -> its rank instead of r
    alpha_pattern: dict[str, Alpha] = field(default_factory=dict)

    def targets(self, module: str) -> bool:
        """Tells whether a module gets a LoRA: `check_target_module_exists` in peft/tuners/tuners_utils.py."""
        if self.exclude_modules and matches(self.exclude_modules, module):
            return False
        if str(self.target_modules).lower() == "all-linear":
            return True
        if not matches(self.target_modules, module):
            return False

        # some layers: not for a regular expression, nor for a module that is listed with its whole name
        layers, targets = self.layers_to_transform, self.target_modules
        if layers in (None, ()) or isinstance(targets, str) or module in targets:
            return True
        layers = (layers,) if isinstance(layers, int) else layers
        patterns = self.layers_pattern or ("[^.]*",)
        patterns = (patterns,) if isinstance(patterns, str) else patterns
        for pattern in patterns:
            place = re.match(rf"(?:^|.*?\.){pattern}\.(?P<layer>\d+)\.", module)
            if place:
                return int(place["layer"]) in layers
        return False

    def rank(self, module: str) -> int:
        return _of_pattern(self.rank_pattern, module, self.r)

    def scale(self, module: str) -> float:
        """The factor of a module's update."""
        rank = self.rank(module)
        alpha = _of_pattern(self.alpha_pattern, module, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def matches(patterns: Patterns, module: str) -> bool:
    """Tells whether a regular expression, or one of a list of names or of their ends, describes a module."""
    if isinstance(patterns, str):
        return bool(re.fullmatch(patterns, module))
    return any(f".{module}".endswith(f".{name}") for name in patterns or ())


def _of_pattern(values: dict, module: str, default):
    # the first that matches counts: `get_pattern_key` in peft/utils/other.py
    for pattern, value in values.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


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


def lora_modules(decoder: Decoder, names: NameMap) -> list[str]:
    """The names on disk of the modules of all layers that LoRA can be put beside: model.layers.0.self_attn.q_proj, …"""
    modules = []
    for layer in range(len(decoder.layers)):
        for name in lora_targets(names):
            first = names.fused.get(name, (name,))[0]
            block = "self_attn" if first in ATTENTION else "mlp"
            modules.append(f"model.layers.{layer}.{block}.{name}")
    return modules


def add_lora(decoder: Decoder, names: NameMap, config: LoRAConfig):
    """Puts LoRA beside the target modules and freezes the rest of the decoder.

    ValueError where a name in the list of targets is no module of this family, or where nothing matches.
    """
    modules = lora_modules(decoder, names)
    targets = config.target_modules or ()
    for target in () if isinstance(targets, str) else targets:
        if not any(matches((target,), module) for module in modules):
            known = ", ".join(lora_targets(names))
            raise ValueError(f"LoRA has no target {target!r} in this decoder, only {known}")
    chosen = [module for module in modules if config.targets(module)]
    if not chosen:
        raise ValueError(f"LoRA's target_modules {targets!r} match no module of this decoder, such as {modules[0]}")
    for module in chosen:
        _wrap(decoder, module, names, config)

    # of the decoder, LoRA alone learns
    decoder.requires_grad_(False)
    for parameter in lora_parameters(decoder).values():
        parameter.requires_grad_(True)


def _wrap(decoder: Decoder, module: str, names: NameMap, config: LoRAConfig):
    """Wraps a projection, or those that a family fuses on disk: they share one A, as PEFT has one for the module."""
    parent, name = module.removeprefix("model.").rsplit(".", 1)
    block = decoder.get_submodule(parent)
    lora_A = None
    for part in names.fused.get(name, (name,)):
        base = getattr(block, part)
        # all of the group read the same input: the first one's A serves all
        if lora_A is None:
            # PEFT's initial values
            lora_A = nn.Linear(base.in_features, config.rank(module), bias=False, device=base.weight.device)
            nn.init.kaiming_uniform_(lora_A.weight, a=math.sqrt(5))
        setattr(block, part, LoRALinear(base, lora_A, config.scale(module), config.lora_dropout))


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
            block.join()
