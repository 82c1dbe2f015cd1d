"""Parts from nothing: an image encoder and a language model with fresh weights, written as stock ones are.

What trains from nothing begins with them (`configs/phantom_pretrain.py`), and so does what measures.
"""

import re
from pathlib import Path

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from torch import nn

from decoder import Decoder, decoder_config
from encoder import Encoder, encoder_config
from plumbing import checkpoint
from plumbing.files import atomic_folder, write_json

DINOV2_NAMES = (  # our parameter names -> those of DINOv2 on disk; the way back is in encoder.FAMILIES
    (r"^patch_embed\.", "embeddings.patch_embeddings.projection."), (r"^class_token", "embeddings.cls_token"),
    (r"^position_embeddings", "embeddings.position_embeddings"), (r"^layers\.", "encoder.layer."),
    (r"\.(query|key|value)\.", r".attention.attention.\1."), (r"\.out\.", ".attention.output.dense."),
    (r"\.(fc[12])\.", r".mlp.\1."), (r"\.scale([12])$", r".layer_scale\1.lambda1"),
)  # fmt: skip


def disk_name(name: str) -> str:
    """Our name of a parameter of a DINOv2 encoder -> its name on disk."""
    for pattern, replacement in DINOV2_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def init_weights(module: nn.Module, seed: int):
    """Fresh weights, as language models take them: normal with a spread of 0.02, biases 0, norms and scales 1."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif "norm" in name or re.search(r"\.scale[12]$", name):
                parameter.fill_(1)
            else:
                parameter.normal_(0, 0.02, generator=random)


def write_encoder(folder: Path, fields: dict, mean: float = 0.5, std: float = 0.25, seed: int = 0):
    """A DINOv2 encoder of these config.json fields, for square images that are not cropped."""
    fields = dict(model_type="dinov2", layer_norm_eps=1e-6) | fields
    encoder = Encoder(encoder_config(fields, folder, {}))
    init_weights(encoder, seed)
    side = fields["image_size"]
    pixels = dict(size={"shortest_edge": side}, crop_size={"height": side, "width": side}, do_center_crop=True,
                  image_mean=[mean] * 3, image_std=[std] * 3, resample=3, rescale_factor=1 / 255)  # fmt: skip
    with atomic_folder(folder) as partial:
        write_json(partial / "config.json", fields)
        write_json(partial / "preprocessor_config.json", pixels)
        checkpoint.write_tensors(partial, ((disk_name(name), p) for name, p in encoder.named_parameters()))


def write_decoder(folder: Path, fields: dict, texts, seed: int = 0):
    """A Llama of these config.json fields with a byte-level BPE, of at most vocab_size tokens, learnt from texts."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=fields["vocab_size"], special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fields = dict(model_type="llama", rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2, torch_dtype="float32") | fields
    fields |= {"vocab_size": tokenizer.get_vocab_size()}
    decoder = Decoder(decoder_config(fields, folder))
    init_weights(decoder, seed)
    names = lambda name: name if name == "lm_head.weight" else f"model.{name}"
    with atomic_folder(folder) as partial:
        write_json(partial / "config.json", fields)
        tokens = dict(zip(("unk_token", "bos_token", "eos_token"), special, strict=True))
        write_json(partial / "tokenizer_config.json", tokens)
        (partial / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
        checkpoint.write_tensors(partial, ((names(name), p) for name, p in decoder.named_parameters()))
