"""A new image encoder and a new language model with fresh weights, in the layout of published ones.

Training from nothing begins with them (`configs/phantom_pretrain.py`), and so do benchmarks.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import torch
from tokenizers import ByteLevelBPETokenizer
from tokenizers.processors import TemplateProcessing
from torch import nn

from decoder import Decoder
from encoder import Encoder, encoder_config
from plumbing import checkpoint
from plumbing.families import decoder_config
from plumbing.fields import check_value
from plumbing.files import atomic_folder, write_json

# our parameter names -> those of DINOv2 on disk; encoder.FAMILIES has the way back
DINOV2_NAMES = {
    r"^patch_embed\.": "embeddings.patch_embeddings.projection.",
    r"^class_token": "embeddings.cls_token",
    r"^position_embeddings": "embeddings.position_embeddings",
    r"^layers\.": "encoder.layer.",
    r"\.(query|key|value)\.": r".attention.attention.\1.",
    r"\.out\.": ".attention.output.dense.",
    r"\.(fc[12])\.": r".mlp.\1.",
    r"\.scale([12])$": r".layer_scale\1.lambda1",
}


def init_weights(module: nn.Module, seed: int):
    """Set weights to normal values with a standard deviation of 0.02, biases to 0, norms and layer scales to 1.

    That of position embeddings is 1: otherwise the features of a small encoder hardly tell their place, by which TAC
    finds the same place of the prior (docs/phantom.md, "What TAC needs to start").
    """
    random = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif "norm" in name or re.search(r"\.scale[12]$", name):
            nn.init.ones_(parameter)
        else:
            deviation = 1 if name == "position_embeddings" else 0.02
            nn.init.normal_(parameter, 0, deviation, generator=random)


def write_encoder(folder: Path, fields: dict, mean: float = 0.5, std: float = 0.25, seed: int = 0):
    """Writes a DINOv2 encoder; `fields` are those of its config.json. mean, std: of the grey values it is to see."""
    fields = {"model_type": "dinov2", "layer_norm_eps": 1e-6} | fields
    # the names below are DINOv2's
    check_value(fields["model_type"], Literal["dinov2"], "model_type", f"{folder}/config.json")
    encoder = Encoder(encoder_config(fields, folder, {}))
    init_weights(encoder, seed)

    tensors = {}
    for name, tensor in encoder.named_parameters():
        for pattern, replacement in DINOV2_NAMES.items():
            name = re.sub(pattern, replacement, name)
        tensors[name] = tensor

    side = encoder.config.image_size  # a square image is resized and never cropped
    pixels = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}, "do_center_crop": True}
    pixels |= {"image_mean": [mean] * 3, "image_std": [std] * 3, "resample": 3, "rescale_factor": 1 / 255}
    with atomic_folder(folder) as partial:
        write_json(partial / "config.json", fields)
        write_json(partial / "preprocessor_config.json", pixels)
        checkpoint.write_tensors(partial, tensors.items())


def write_decoder(folder: Path, fields: dict, texts: Iterable[str], seed: int = 0):
    """Writes a Llama with the `fields` of its config.json, and a byte-level BPE of at most vocab_size tokens."""
    # 1) check the fields, and learn the tokenizer
    defaults = {"model_type": "llama", "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2}
    fields = defaults | {"torch_dtype": "float32"} | fields
    check_value(fields["model_type"], Literal["llama"], "model_type", f"{folder}/config.json")
    config = decoder_config(fields, folder)
    unk, bos, eos = special = ["<unk>", "<s>", "</s>"]
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[(bos, 1)])
    settings = {"min_frequency": 0, "special_tokens": special, "show_progress": False}
    tokenizer.train_from_iterator(texts, config.vocab_size, **settings)

    # 2) build the model for it
    fields |= {"vocab_size": tokenizer.get_vocab_size()}
    decoder = Decoder(decoder_config(fields, folder))
    init_weights(decoder, seed)
    # on disk all names but that of the head begin with "model."
    tensors = {re.sub(r"^(?!lm_head)", "model.", name): tensor for name, tensor in decoder.named_parameters()}

    # 3) write both
    with atomic_folder(folder) as partial:
        write_json(partial / "config.json", fields)
        write_json(partial / "tokenizer_config.json", {"unk_token": unk, "bos_token": bos, "eos_token": eos})
        tokenizer.save(str(partial / "tokenizer.json"), pretty=False)
        checkpoint.write_tensors(partial, tensors.items())
