"""Which published file holds which part of a model: finding, reading and writing them.

A folder or a hub repository is one of three things, which its files tell:

    a whole checkpoint     config.json, model*.safetensors or pytorch_model*.bin, tokenizer files
    a PEFT adapter         adapter_config.json, adapter_model.*, and non_lora_trainables.bin with the connector
    a connector            mm_projector.* or mm_tac_projector.bin, with or without a config.json

An adapter or a connector names its base model, which may be an adapter again. We write the same layouts.
"""

import itertools
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
from torch import nn

from decoder import Decoder
from encoder import Encoder, EncoderConfig, encoder_config, encoder_tensors
from lora import LoRAConfig, lora_modules, lora_parameters, matches
from plumbing import checkpoint
from plumbing.checkpoint import Source, StoredTensor
from plumbing.families import check_family, decoder_config, family_of, names_of
from plumbing.fields import Range, Share, check_fields, check_present, check_value, shorten
from plumbing.files import atomic_folder, check_supported, read_json, read_json_if_present, write_json
from plumbing.pixels import PREPROCESSOR_FILES, PixelConfig, open_clip_pixels, read_pixel_config
from plumbing.quantised import KINDS, Int4Linear, kind_of, pack_linears, quantise_linears
from tac import TACPart, make_connector
from tokenizer import IMAGE_END, IMAGE_START, Tokenizer, template_of

CONNECTOR_FILES = ("mm_projector.safetensors", "mm_tac_projector.bin", "mm_projector.bin")
CONNECTOR_FILE = re.compile(r"mm_\w*projector\w*\.(bin|safetensors)")
OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
TRAINED_FILES = ("non_lora_trainables.bin",)
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "generation_config.json",
)  # fmt: skip

# prefixes of the names of tensors: in PEFT's files, and of an encoder inside a checkpoint
PEFT_PREFIX = "base_model.model."
ENCODER_PREFIX = "model.vision_tower.vision_tower."

# the fields of config.json that make a language model a Libra
OURS = re.compile("mm_.*|use_mm_proj|image_aspect_ratio|unfreeze_mm_vision_tower|use_maira_feature_norm")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


Name = Annotated[str, Range(1, 4096)]


@dataclass(frozen=True)
class LibraConfig:
    """The fields of config.json that tie encoder, connector and decoder together, with the published defaults."""

    json: dict  # the whole file
    mm_vision_tower: Name
    mm_projector_type: Annotated[str, Range(1, 100)] = "linear"
    mm_vision_select_layer: Annotated[int, Range(-1000, 1000)] | Literal["all"] = -2
    mm_vision_select_feature: Literal["patch", "cls_patch"] = "patch"
    image_aspect_ratio: Literal["pad", "square"] | None = None
    mm_image_pad: Literal["mean", "black", "none"] | None = None  # ours: how images were padded in training
    mm_use_im_patch_token: bool = True
    mm_dicom_display: Literal["standard", "jpg"] | None = None  # ours: how DICOM was shown in training
    mm_use_im_start_end: bool = False
    mm_vision_tower_config: Name | None = None  # the two files of an open_clip encoder
    mm_vision_tower_checkpoint: Name | None = None
    mm_conversation_template: Name | None = None  # ours
    mm_tac_without: tuple[TACPart, ...] | None = None  # ours: the parts that TAC does not have, for ablations
    mm_weights: Literal["int8", "int4"] | None = None  # ours: of the decoder's linear layers, plumbing/quantised.py
    unfreeze_mm_vision_tower: bool | None = False
    use_maira_feature_norm: bool | None = False
    torch_dtype: Name | None = None
    dtype: Name | None = None  # its name in `transformers` 5

    @property
    def pad(self) -> str:
        """How images become square. The published inference code pads with the mean colour."""
        return self.mm_image_pad or ("mean" if self.image_aspect_ratio == "pad" else "none")


# fields of LLaVA's other models that change the image's features -> what they may be here
UNUSED = dict(
    s2=Literal[False] | None, mm_resampler_type=type(None), mm_patch_merge_type=Literal["flat"] | None,
    mm_spatial_pool_mode=type(None),
)  # fmt: skip


def libra_config(json: dict, source) -> LibraConfig:
    """Reads a parsed config.json. ValueError names the field whose value is not supported."""
    where = f"{source}/config.json"
    if "mm_vision_tower" not in json:
        raise ValueError(f"{where}: no mm_vision_tower: this is a language model, not a Libra checkpoint")
    check_present(json, UNUSED, where)

    # some published files have the number as text
    settings, layer = dict(json), json.get("mm_vision_select_layer")
    if isinstance(layer, str) and re.fullmatch(r"-?\d{1,3}", layer):
        settings["mm_vision_select_layer"] = int(layer)
    return LibraConfig(**check_fields(settings | {"json": json}, LibraConfig, where))


# LLaVA's names -> ours for the same layout, and the template of LLaVA where its config has no other
LLAVA_TYPES = {"llava": "libra", "llava_llama": "libra", "llava_mistral": "libra_mistral"}
LLAVA_TEMPLATES = {"libra": "v1", "libra_mistral": "llava_med_v1.5_mistral_7b"}


def read_config(source: Source) -> dict:
    """Reads the config.json of a Libra, a LLaVA or a language model; that of a LLaVA becomes a Libra's.

    ValueError where it describes another layout, packed weights or, in a LLaVA, more than one view of an image.
    """
    where = source.folder / "config.json"
    json = read_json(where)
    check_family(json, where)
    model_type = LLAVA_TYPES.get(json["model_type"])
    if not model_type:
        return json
    # LLaVA-1.6 cuts an image into tiles, which changes the number and the order of its positions
    views = dict(image_aspect_ratio=(None, "pad", "square"), mm_patch_merge_type=(None, "flat"), s2=(None, False))
    check_supported(json, views, where)
    return {"mm_conversation_template": LLAVA_TEMPLATES[model_type]} | json | {"model_type": model_type}


def new_config(source: Source, tower: Source, connector: str, select_layer: int, pad: str) -> dict:
    """Returns the config.json of a new model: the language model's, and what ties it to an encoder and a connector."""
    json = read_config(source)
    # refuse an unsupported family here, before its name changes
    decoder_config(json, source.folder)
    family = family_of(json)
    select_layer = "all" if connector == "TAC" else select_layer
    # of a Libra, only its language model counts: not its encoder, nor how it read that
    json = {name: value for name, value in json.items() if not OURS.fullmatch(name)}
    return json | dict(
        model_type="libra" if family == "llama" else f"libra_{family}",
        mm_vision_tower=tower.repository or str(tower.folder.resolve()),
        mm_projector_type=connector, mm_vision_select_layer=select_layer, mm_vision_select_feature="patch",
        mm_use_im_start_end=False, mm_use_im_patch_token=False, use_mm_proj=True,
        image_aspect_ratio="pad", mm_image_pad=pad, mm_dicom_display="standard",
    )  # fmt: skip


# ------------------------------------------------------------------------------------------ finding files


@dataclass(frozen=True)
class ModelFiles:
    """The files of a model: a folder of weights, the config that counts, and what replaces some of the weights."""

    weights: Source  # decoder and tokenizer; a whole checkpoint has the connector and may have the encoder, too
    config: dict
    config_source: Source
    overlays: tuple[Path, ...] = ()  # files of tensors that replace those of the weights; the last one wins
    adapters: tuple[Source, ...] = ()


def find_model_files(place, base=None, relative_to: Path | None = None, above: tuple[Path, ...] = ()) -> ModelFiles:
    """Finds the files of a whole checkpoint, a PEFT adapter, a connector's folder or a connector's file.

    base: the model below an adapter or a connector, instead of the recorded one. The topmost config.json counts.
    above: the places whose base this is.
    """
    # 1) a connector's file, or a folder whose files tell what it is
    place, overlay, is_adapter = Path(place), None, False
    if place.is_file() and CONNECTOR_FILE.fullmatch(place.name):
        source, overlay = Source(place.parent), place
    else:
        source = checkpoint.locate(place, relative_to)
        is_adapter = (source.folder / "adapter_config.json").exists()
    file = source.folder / "config.json"
    config = read_config(source) if file.exists() else {}
    if is_adapter:
        overlay = checkpoint.find_file(source, TRAINED_FILES)
    elif not overlay and not checkpoint.has_weights(source):
        overlay = checkpoint.find_file(source, CONNECTOR_FILES)

    # 2) a whole checkpoint has everything
    if not (overlay or is_adapter):
        if base:
            raise ValueError(f"{source} is a whole checkpoint: --base goes with an adapter or a connector")
        return ModelFiles(source, config or read_config(source), source)

    # 3) an adapter or a connector needs the model below
    record = read_json(source.folder / "adapter_config.json") if is_adapter else config
    below = base or check_value(record.get("base_model_name_or_path"), str | None, "base_model_name_or_path", source)
    if not below:
        raise ValueError(f"{overlay or source} names no base model: give it with --base")
    here = (place if place.is_file() else source.folder).resolve()
    if here in above:
        raise ValueError(f"{overlay or source} names itself as its base: give its base with --base")
    files = find_model_files(below, relative_to=None if base else source.folder, above=(*above, here))

    if not base and is_adapter and record.get("revision") not in (None, "main"):
        problem = f"{source} is for revision {shorten(record['revision'])} of {below}"
        raise ValueError(f"{problem}: download that revision, and give its folder with --base")

    # 4) put this one on top
    if overlay:
        files = replace(files, overlays=(*files.overlays, overlay))
    if is_adapter:
        files = replace(files, adapters=(*files.adapters, source))
    if "mm_vision_tower" in config:
        files = replace(files, config=config, config_source=source)
    return files


class EncoderFiles(NamedTuple):
    """A stock image encoder on disk."""

    source: Source
    config: dict
    tensors: dict[str, StoredTensor]  # by their names on disk
    pixels: dict | None = None  # an open_clip encoder's preprocess_cfg
    has_place: bool = True  # its folder or repository tells what it is; else the config names two files

    @property
    def is_open_clip(self) -> bool:
        return "vision_cfg" in self.config


def find_encoder_files(config: LibraConfig, source: Source, encoder=None) -> EncoderFiles:
    """Finds the image encoder of a checkpoint; encoder: a folder or a hub id to use instead."""
    # a folder of its own
    if encoder or not config.mm_vision_tower_config:
        tower = checkpoint.locate(encoder) if encoder else checkpoint.locate(config.mm_vision_tower, source.folder)
        file, open_clip = tower.folder / "config.json", open_clip_files(tower)
        if open_clip and "model_type" not in read_json_if_present(file):
            return _read_open_clip(tower, *open_clip)
        return EncoderFiles(tower, read_json(file), checkpoint.list_tensors(tower))

    # the two files of an open_clip encoder, at the paths in the config or beside it
    files = []
    for name in (config.mm_vision_tower_config, config.mm_vision_tower_checkpoint or ""):
        file = checkpoint.find_file(source, (name, Path(name).name))
        if file is None:
            raise FileNotFoundError(f"{source} lacks the encoder's file {name}, also beside its config.json: fetch it")
        files.append(file)
    return _read_open_clip(Source(files[0].parent), *files)._replace(has_place=False)


def open_clip_files(tower: Source) -> tuple[Path, Path] | None:
    """Finds the config and the weights of an open_clip encoder: open_clip_config.json, or NAME.json of a trainer.

    None if there is no such pair; FileNotFoundError if only the weights are missing.
    """
    file = tower.folder / "open_clip_config.json"
    if file.exists():
        weights = checkpoint.find_file(tower, OPEN_CLIP_WEIGHTS)
        if not weights:
            raise FileNotFoundError(f"{tower} lacks {' or '.join(OPEN_CLIP_WEIGHTS)}: fetch it again")
        return file, weights

    if not (tower.folder / "config.json").exists():
        tower.fetch(["*_checkpoint.pt"])
    for weights in sorted(tower.folder.glob("*_checkpoint.pt")):
        file = weights.with_name(weights.name.replace("_checkpoint.pt", ".json"))
        if file.exists():
            return file, weights
    return None


def _read_open_clip(source: Source, file: Path, weights: Path) -> EncoderFiles:
    json = read_json(file)
    model, pixels = json.get("model_cfg", json), json.get("preprocess_cfg", {})
    check_value(pixels, dict, "preprocess_cfg", file)
    model = check_value(model, dict, "model_cfg", file)
    vision = check_value(model.get("vision_cfg"), dict, "vision_cfg", file)
    # 64 channels to a head, which the file does not say, is true of these alone
    name = vision.get("timm_model_name")
    if not re.match(r"vit_(tiny|small|base|large)_patch\d+", str(name)):
        raise ValueError(f"{file}: timm_model_name {shorten(name)} is no ViT of the sizes tiny to large")
    # the size, or open_clip's default
    size = pixels.get("size") or 224
    vision = {"image_size": size[0] if isinstance(size, list) else size} | vision
    # a trainer saves its model as a module of a larger one, and encoder.py knows the longer names
    tensors = {}
    for name, tensor in checkpoint.file_tensors(weights).items():
        tensors[f"module.{name.removeprefix('module.')}"] = tensor
    return EncoderFiles(source, model | {"vision_cfg": vision}, tensors, pixels)


def _open_clip_pixels(tower: EncoderFiles, size: int, pad: str) -> PixelConfig:
    """open_clip's preprocessing with the mean and deviation of preprocess_cfg, if there are any."""
    where = f"{tower.source}'s preprocess_cfg"
    supported = dict(size=(size, [size, size]), mode=("RGB",), interpolation=("bicubic",), resize_mode=("shortest",))
    settings = tower.pixels or {}
    check_supported(settings, supported, where)
    pixels = open_clip_pixels(size, pad)
    colours = {}
    for name, default in (("mean", pixels.mean), ("std", pixels.std)):
        channel = Annotated[float, Range(1e-6, 1)] if name == "std" else Share
        colours[name] = check_value(settings.get(name, default), tuple[channel, channel, channel], name, where)
    return replace(pixels, **colours)


def find_device(name: str) -> torch.device:
    """auto (cuda, else mps, else cpu), cpu, cuda, cuda:1 or mps -> a device; ValueError where there is none."""
    available = [device for device in ("cuda", "mps", "cpu") if getattr(torch, device).is_available()]
    if name == "auto":
        name = available[0]
    if not re.fullmatch(r"(cuda|mps|cpu)(:\d{1,3})?", name) or name.split(":")[0] not in available:
        raise ValueError(f"device {name!r} is not available here: there is {' and '.join(available)}")
    return torch.device(name)


def find_dtype(name: str, device: torch.device, config: dict) -> torch.dtype:
    """auto (float32 on the CPU, else the checkpoint's 16-bit type), stored (the checkpoint's) or a name -> a type.

    int8 and int4 are the type of some weights: of the others it is auto's.
    """
    recorded = str(config.get("torch_dtype") or config.get("dtype") or "float32")
    if name == "stored":
        name = recorded
    elif name in ("auto", *KINDS) and device.type == "cpu":
        name = "float32"
    elif name in ("auto", *KINDS):
        name = recorded if recorded in ("float16", "bfloat16") else "bfloat16"
    if name not in DTYPES:
        raise ValueError(f"dtype {name!r} is not one of auto, stored, {', '.join([*KINDS, *DTYPES])}")
    return DTYPES[name]


# ------------------------------------------------------------------------------------------ reading


def read_model(
    files: ModelFiles,
    *,
    encoder=None,
    device: str = "auto",
    dtype: str = "auto",
    fresh_connector: bool = False,
    changes: dict | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict:
    """Reads a model without its adapters; returns the arguments of `Libra`.

    fresh_connector: do not read the connector, keep torch's random initial values. changes: fields of config.json to
    set, as a new model or a training run does; the config then names its template, too. dtype int8, int4: weights are
    rounded as they are read, unless an adapter has to be merged into them first.
    """
    # 1) configs
    device, folder = find_device(device), files.config_source.folder
    config = libra_config(files.config, folder)
    has_kind = find_kind(files, dtype)
    makes_kind = dtype if dtype in KINDS and not has_kind and not files.adapters else None
    dtype = find_dtype(dtype, device, files.config)
    decoder_settings = decoder_config(files.config, folder)
    tokenizer = Tokenizer(files.weights.folder, sentencepiece_first=files.config["model_type"] == "libra")

    # 2) where every tensor is; the weights of an encoder that was trained replace the stock ones
    tensors = _tensors_by_part(files)
    if decoder_settings.tie_word_embeddings:
        tensors["decoder"].pop("lm_head.weight", None)
    tower = find_encoder_files(config, files.config_source, encoder)
    if config.unfreeze_mm_vision_tower and not tower.is_open_clip:
        tower = tower._replace(tensors=tower.tensors | tensors["encoder"])

    # 3) modules without memory, and the tensors that belong into them
    encoder_settings = encoder_config(tower.config, tower.source, tower.tensors, config.use_maira_feature_norm)
    modules = nn.ModuleDict()
    with torch.device("meta"):
        modules["encoder"] = Encoder(encoder_settings)
        modules["connector"] = _new_connector(config, encoder_settings, decoder_settings)
        modules["decoder"] = Decoder(decoder_settings)
    modules.to(dtype)
    if has_kind:
        quantise_linears(modules["decoder"], has_kind)
    tensors["encoder"] = encoder_tensors(modules["encoder"], tower.tensors)
    tensors["decoder"] = checkpoint.rename_tensors(tensors["decoder"], names_of(files.config), modules["decoder"])
    if fresh_connector:
        del modules["connector"]

    # 4) do names and shapes fit?
    stored = {}
    for part in modules:
        stored |= {f"{part}.{name}": tensor for name, tensor in tensors[part].items()}
    places = ", ".join(map(str, [files.weights, *files.overlays, tower.source]))
    complaint = f"{places} do not fit {folder}/config.json and its connector {config.mm_projector_type}"
    checkpoint.check_fit(dict(modules.named_parameters()), stored, complaint)

    # 5) memory, then data
    if makes_kind:
        quantise_linears(modules["decoder"], makes_kind)
    needed = sum(parameter.nbytes for parameter in modules.parameters())
    checkpoint.check_memory(needed, device, has_kind or makes_kind or str(dtype).removeprefix("torch."))
    _allocate(modules, device)
    checkpoint.load_tensors(dict(modules.named_parameters()), stored, progress)
    pack_linears(modules["decoder"])
    if fresh_connector:
        modules["connector"] = _new_connector(config, encoder_settings, decoder_settings).to(device, dtype)

    # 6) settings
    if changes is not None:
        template = template_of(config.json | changes, tokenizer)
        added = dict(mm_hidden_size=encoder_settings.hidden_size, mm_conversation_template=template)
        config = libra_config(config.json | added | changes, folder)
    _add_image_tokens(tokenizer, config, decoder_settings.vocab_size, folder)
    if tower.is_open_clip:
        pixels = _open_clip_pixels(tower, encoder_settings.image_size, config.pad)
    else:
        pixels = read_pixel_config(tower.source.folder, config.pad)
    pixels = replace(pixels, dicom_display=config.mm_dicom_display or "standard")
    if pixels.crop < encoder_settings.patch_size:
        sizes = f"images of {pixels.crop} pixels, but patches of {encoder_settings.patch_size}"
        raise ValueError(f"{tower.source}: {sizes}")
    return dict(
        **modules, config=config, tokenizer=tokenizer, pixels=pixels,
        eos_token_ids=_eos_token_ids(files.weights.folder, files.config, decoder_settings.vocab_size),
        base=files.weights, weights=files.weights, encoder_files=tower._replace(tensors=tensors["encoder"]),
    )  # fmt: skip


def _allocate(modules: nn.ModuleDict, device: torch.device):
    # the decoder's matrices side by side from the start: joining them later would copy them
    modules["decoder"].join(device)
    for module in modules.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                memory = torch.empty_like(parameter, device=device)
                setattr(module, name, nn.Parameter(memory, parameter.requires_grad))


def find_kind(files: ModelFiles, dtype: str) -> str | None:
    """Returns int8 or int4 if weights were saved so. ValueError if another type is wanted: the rest is lost."""
    file = files.weights.folder / "config.json"
    kind = check_value(read_json(file).get("mm_weights"), Literal["int8", "int4"] | None, "mm_weights", file)
    if kind and dtype not in ("auto", "stored", kind):
        problem = f"{files.weights} holds {kind} weights, which do not become {dtype} again"
        raise ValueError(f"{problem}: use --dtype {kind}, or the model that it was made from")
    return kind


def _tensors_by_part(files: ModelFiles) -> dict[str, dict[str, StoredTensor]]:
    """{"encoder", "connector", "decoder"} -> tensors by their names within the part."""
    tensors: dict[str, dict[str, StoredTensor]] = {"encoder": {}, "connector": {}, "decoder": {}}

    def add(stored: dict[str, StoredTensor]):
        for name, tensor in stored.items():
            # what PEFT and the trainers put in front does not count
            name = name.removeprefix(PEFT_PREFIX)
            if "mm_projector." in name:
                tensors["connector"][name.split("mm_projector.", 1)[1]] = tensor
            elif name.startswith(ENCODER_PREFIX):
                tensors["encoder"][name.removeprefix(ENCODER_PREFIX)] = tensor
            else:
                tensors["decoder"][name.removeprefix("model.")] = tensor

    # files on top replace the tensors below
    add(checkpoint.list_tensors(files.weights))
    for file in files.overlays:
        stored = checkpoint.file_tensors(file)
        # a file with a connector replaces the whole connector below; an adapter's file may have none
        if any("mm_projector." in name for name in stored):
            tensors["connector"].clear()
        elif file.name not in TRAINED_FILES:
            raise ValueError(f"{file} holds no tensor of a connector (mm_projector.…): fetch it again")
        add(stored)
    # published checkpoints may have their connector in a file beside the weights
    beside = None if tensors["connector"] else checkpoint.find_file(files.weights, CONNECTOR_FILES)
    if beside:
        add(checkpoint.file_tensors(beside))
    return tensors


def _new_connector(config: LibraConfig, encoder: EncoderConfig, decoder) -> nn.Module:
    layer, depth, heads = config.mm_vision_select_layer, encoder.num_hidden_layers, decoder.num_attention_heads
    if layer != "all" and not -depth - 1 <= layer <= depth:
        raise ValueError(f"mm_vision_select_layer {layer} is none of the encoder's {depth} layers")
    layers = depth if layer == "all" else 1
    sizes = dict(num_layers=layers, width=encoder.hidden_size, heads=heads, hidden_size=decoder.hidden_size)
    return make_connector(config.mm_projector_type, without=config.mm_tac_without or (), **sizes)


def _add_image_tokens(tokenizer: Tokenizer, config: LibraConfig, rows: int, folder: Path):
    """Adds the special tokens that the published loading adds, which count as part of the vocabulary."""
    if config.mm_use_im_patch_token:
        tokenizer.add_special(["<im_patch>"])
    if config.mm_use_im_start_end:
        marks = [IMAGE_START, IMAGE_END]
        tokenizer.add_special(marks)
        if any(tokenizer.backend.token_to_id(mark) >= rows for mark in marks):
            raise ValueError(f"{folder}: mm_use_im_start_end is set, but the embeddings have no rows for {marks}")


NEUTRAL = dict(  # settings of generation_config.json that `generate` does not have -> the values that change nothing
    repetition_penalty=1.0, encoder_repetition_penalty=1.0, min_length=0, min_new_tokens=0, min_p=0, typical_p=1.0,
    epsilon_cutoff=0, eta_cutoff=0, diversity_penalty=0, penalty_alpha=0, early_stopping=False, guidance_scale=None,
    bad_words_ids=None, force_words_ids=None, forced_eos_token_id=None, suppress_tokens=None, sequence_bias=None,
    num_beam_groups=1, renormalize_logits=False, forced_bos_token_id=None, begin_suppress_tokens=None,
    exponential_decay_length_penalty=None,
)  # fmt: skip


def _eos_token_ids(folder: Path, config: dict, rows: int) -> list[int]:
    """Returns the ids that end a report; rows: those of the embeddings.

    Warns about settings of generation_config.json, or else of config.json, that would change a report.
    """
    sources = {folder / "config.json": config}
    file = folder / "generation_config.json"
    if file.exists():
        sources = {file: read_json(file)} | sources
    file, generation = next(iter(sources.items()))
    for name, neutral in NEUTRAL.items():
        if generation.get(name) not in (None, neutral):
            warnings.warn(f"{file}: {name} {shorten(generation[name])} is not applied", stacklevel=2)
    row = Annotated[int, Range(0, rows - 1)]
    for file, settings in sources.items():
        eos = check_value(settings.get("eos_token_id"), row | list[row] | None, "eos_token_id", file)
        if eos is not None:
            return [eos] if isinstance(eos, int) else list(eos)
    return []


# Every field of PEFT's LoraConfig is in LoRAConfig (computed) or in one of these three. A field in none of them, which
# a later PEFT may have, is refused like the second kind: unless it is null, false or empty.
ADAPTER_VALUES = {  # the values that we compute with
    "peft_type": Literal["LORA"],
    "bias": Literal["none"],
    # These set the first values of A and B, which the file replaces. The others (pissa, olora, corda, loftq, lora_ga)
    # change the base's weights as well: `update_layer` in peft/tuners/lora/layer.py.
    "init_lora_weights": bool | Literal["gaussian", "eva", "orthogonal", "mica"] | None,
}
ADAPTER_REFUSED = (
    "modules_to_save", "trainable_token_indices", "target_parameters", "use_dora", "lora_bias", "layer_replication",
    "megatron_config", "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config", "monteclora_config",
    "kasa_config", "velora_config",
)  # fmt: skip
ADAPTER_NEUTRAL = (
    # descriptions
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    # of the initial values, of other hardware; of embeddings, beside which no LoRA is supported
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config",
    "qalora_group_size", "megatron_core", "ensure_weight_tying",
    # PEFT sets it to false beside a torch.nn.Linear; merge_weights was a field of its first versions
    "fan_in_fan_out", "merge_weights",
)  # fmt: skip


def adapter_config(json: dict, where) -> LoRAConfig:
    """Reads a parsed adapter_config.json, with PEFT's defaults. ValueError names a field that is not supported."""
    advice = "merge the adapter into its base with PEFT (merge_and_unload), and use the merged model"
    for name, hint in ADAPTER_VALUES.items():
        try:
            check_value(json.get(name), hint | None, name, where)
        except ValueError as error:
            raise ValueError(f"{error}: {advice}") from None
    known = {*ADAPTER_VALUES, *ADAPTER_NEUTRAL, *(field.name for field in fields(LoRAConfig))}
    for name, value in json.items():
        if value and name not in known:
            problem = "is not supported" if name in ADAPTER_REFUSED else "is a field that this program does not know"
            raise ValueError(f"{where}: {name} {shorten(value)} {problem}: {advice}")
    # a field that is null has its default
    return LoRAConfig(**check_fields({k: v for k, v in json.items() if v is not None}, LoRAConfig, where))


def load_adapter(libra, source: Source):
    """Puts an adapter in PEFT's layout beside the layers of a model, unmerged. ValueError names what is unsupported."""
    # 1) its config
    where = source.folder / "adapter_config.json"
    config = adapter_config(read_json(where), where)

    # 2) its tensors, whose names have a longer form in a trainer's files:
    #    base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight -> layers.0.mlp.up_proj.lora_A.weight
    file = checkpoint.find_file(source, ADAPTER_FILES)
    if file is None:
        raise FileNotFoundError(f"{source} holds no adapter ({' or '.join(ADAPTER_FILES)}): fetch it again")
    stored = {}
    for name, tensor in checkpoint.file_tensors(file).items():
        our_name = name.removeprefix(f"{PEFT_PREFIX}model.").replace(".default.weight", ".weight")
        if not re.fullmatch(r"layers\.\d+\..+\.lora_[AB]\.weight", our_name):
            raise ValueError(f"{file}: {name} is no LoRA matrix of a decoder layer, which is not supported")
        stored[our_name] = tensor

    # 3) put it into the model. PEFT ignores a name in a list of targets that matches nothing
    names, targets = names_of(libra.config.json), config.target_modules
    if targets is None:
        targets = tuple(sorted({f"model.{name.split('.lora_')[0]}" for name in stored}))
    elif not isinstance(targets, str):
        modules = lora_modules(libra.decoder, names)
        targets = tuple(target for target in sorted(targets) if any(matches((target,), name) for name in modules))
    try:
        libra.add_lora(replace(config, target_modules=targets))
    except re.error as error:
        raise ValueError(f"{where}: {error.pattern!r} is no regular expression ({error})") from None
    parameters = lora_parameters(libra.decoder)
    tensors = checkpoint.rename_tensors(stored, names, libra.decoder)
    checkpoint.check_fit(parameters, tensors, f"the adapter in {source} does not fit its base {libra.base}")
    checkpoint.load_tensors(parameters, tensors)


# ------------------------------------------------------------------------------------------ writing


def write_model(libra, folder, dtype: torch.dtype | None, shard_size: int, with_encoder: bool):
    """Writes a whole checkpoint with LoRA merged; see `Libra.save_pretrained`."""
    config = _config_for(libra, folder)
    config["torch_dtype"] = str(dtype or libra.dtype).removeprefix("torch.")
    if kind := kind_of(libra.decoder):
        config["mm_weights"] = kind
    named = itertools.chain(_decoder_tensors(libra), _connector_tensors(libra))
    if with_encoder:
        # the copy of the encoder has what it learnt
        config |= {"mm_vision_tower": "encoder", "unfreeze_mm_vision_tower": False}
    else:
        named = itertools.chain(named, _trained_encoder_tensors(libra))

    def in_type(name: str, tensor):
        # neither rounded weights nor their scales change
        keeps = dtype is None or tensor.dtype in checkpoint.BYTES or name.endswith(".weight_scale")
        return tensor if keeps else tensor.to(dtype)

    tensors = ((name, in_type(name, tensor)) for name, tensor in named)

    with atomic_folder(folder, checkpoint.LAYOUT_FILE) as partial:
        if with_encoder:
            write_encoder(libra, partial / "encoder")
        write_json(partial / "config.json", config)
        _copy_files(libra.weights.folder, TOKENIZER_FILES, partial)
        checkpoint.write_tensors(partial, tensors, shard_size)


def write_encoder(libra, folder):
    """Writes the image encoder as a stock one."""
    if libra.encoder_files.is_open_clip:
        raise ValueError("an open_clip encoder has a layout of its own: it is named, not copied")
    with atomic_folder(folder, checkpoint.ENCODER_FILE) as partial:
        _copy_files(libra.encoder_files.source.folder, ("config.json", *PREPROCESSOR_FILES), partial)
        checkpoint.write_tensors(partial, _encoder_tensors(libra))


def write_language_model(libra, folder):
    """Writes the decoder and the tokenizer as a stock language model, which other engines find by its fields."""
    config = {name: value for name, value in libra.config.json.items() if not OURS.fullmatch(name)}
    # `auto_map` names Python files that are not copied; `dtype` is another name of torch_dtype
    for name in ("auto_map", "dtype"):
        config.pop(name, None)
    family = family_of(config)
    config |= dict(model_type=family, architectures=[f"{family.capitalize()}ForCausalLM"])
    config["torch_dtype"] = str(libra.dtype).removeprefix("torch.")
    with atomic_folder(folder, checkpoint.LAYOUT_FILE) as partial:
        write_json(partial / "config.json", config)
        _copy_files(libra.weights.folder, TOKENIZER_FILES, partial)
        checkpoint.write_tensors(partial, _decoder_tensors(libra))


def write_connector(libra, folder):
    """Writes the connector alone, in both published formats, and a config.json that records the model below it."""
    config = _config_for(libra, folder) | {"base_model_name_or_path": _place_for(libra.base, folder)}
    with atomic_folder(folder, checkpoint.LAYOUT_FILE) as partial:
        write_json(partial / "config.json", config)
        tensors = dict(_connector_tensors(libra))
        checkpoint.write_safetensors(partial / CONNECTOR_FILES[0], tensors)
        checkpoint.write_bin(partial / CONNECTOR_FILES[-1], tensors)


def write_adapter(libra, folder):
    """Writes LoRA in PEFT's layout, and non_lora_trainables.bin with the connector and a trained encoder."""
    # PEFT's fields: ours, what kind of adapter it is, and the model below
    record = asdict(libra.lora) | dict(peft_type="LORA", bias="none", task_type="CAUSAL_LM", inference_mode=True)
    record["base_model_name_or_path"] = _place_for(libra.base, folder)

    # what else was trained, with the prefix that PEFT puts before every name
    named = itertools.chain(_connector_tensors(libra), _trained_encoder_tensors(libra))
    trained = {PEFT_PREFIX + name: tensor for name, tensor in named}
    with atomic_folder(folder, checkpoint.LAYOUT_FILE) as partial:
        write_json(partial / "config.json", _config_for(libra, folder))
        write_json(partial / "adapter_config.json", record)
        checkpoint.write_safetensors(partial / ADAPTER_FILES[0], _lora_tensors(libra))
        checkpoint.write_bin(partial / TRAINED_FILES[0], trained)


def _config_for(libra, folder) -> dict:
    # config.json with paths relative to a folder
    config = dict(libra.config.json)
    config.pop("base_model_name_or_path", None)
    config.pop("mm_weights", None)  # a whole checkpoint's own
    tower = _place_for(libra.encoder_files.source, folder)
    files = ("mm_vision_tower_config", "mm_vision_tower_checkpoint")
    if libra.encoder_files.has_place:
        config["mm_vision_tower"] = tower
        # what these files told of the template must not be lost with them
        names = [config.pop(name, None) for name in files]
        if any(names):
            config.setdefault("mm_conversation_template", libra.template)
    else:
        config |= {name: f"{tower}/{Path(config[name]).name}" for name in files}
    return config


def _place_for(source: Source, folder) -> str:
    # a hub id, or a path relative to a folder
    return source.repository or os.path.relpath(source.folder.resolve(), Path(folder).resolve())


def _copy_files(source: Path, names, folder: Path):
    for name in names:
        if (source / name).exists():
            shutil.copy(source / name, folder)


def _connector_tensors(libra) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in libra.connector.named_parameters():
        yield f"model.mm_projector.{name}", parameter


def _encoder_tensors(libra) -> Iterator[tuple[str, torch.Tensor]]:
    # names and shapes as in the encoder's own repository; a trained encoder was read from a whole model or an adapter
    for name, parameter in libra.encoder.named_parameters():
        stored = libra.encoder_files.tensors[name]
        published = stored.name.removeprefix(PEFT_PREFIX).removeprefix(ENCODER_PREFIX)
        yield published, parameter.view(stored.shape)


def _trained_encoder_tensors(libra) -> Iterator[tuple[str, torch.Tensor]]:
    # published loading ignores an open_clip encoder inside a checkpoint
    if libra.config.unfreeze_mm_vision_tower and not libra.encoder_files.is_open_clip:
        for name, parameter in _encoder_tensors(libra):
            yield ENCODER_PREFIX + name, parameter


def _decoder_tensors(libra) -> Iterator[tuple[str, torch.Tensor]]:
    """LoRA is merged and fused modules are stacked one tensor at a time, so memory does not grow with the model."""
    # 1) how to make each of our tensors
    makers: dict[str, Callable[[], torch.Tensor]] = {}
    for name, parameter in libra.decoder.named_parameters():
        if name.endswith(".base_layer.weight"):
            module = name.removesuffix(".base_layer.weight")
            makers[f"{module}.weight"] = libra.decoder.get_submodule(module).merged
        elif ".lora_" not in name:
            makers[name.replace(".base_layer.", ".")] = lambda parameter=parameter: parameter

    for module, layer in libra.decoder.named_modules():
        if isinstance(layer, Int4Linear):
            for name, _ in layer.named_parameters():
                makers[f"{module}.{name}"] = partial(layer.stored, name)

    # 2) stack what the family fuses on disk: q_proj, k_proj, v_proj -> qkv_proj
    for fused, (first, *others) in names_of(libra.config.json).fused.items():
        for name in [name for name in makers if f".{first}." in name]:
            parts = [makers.pop(name.replace(f".{first}.", f".{part}.")) for part in (first, *others)]
            fused_name = name.replace(f".{first}.", f".{fused}.")
            makers[fused_name] = lambda parts=parts: torch.cat([make() for make in parts])

    for name, make in makers.items():
        yield name if name.startswith("lm_head.") else f"model.{name}", make()


def _lora_tensors(libra) -> dict[str, torch.Tensor]:
    fused = names_of(libra.config.json).fused
    parts: dict[str, list[torch.Tensor]] = {}
    for name, parameter in lora_parameters(libra.decoder).items():
        # layers.0.self_attn.q_proj.lora_A.weight -> layers.0.self_attn, q_proj, A.weight
        module, matrix = name.split(".lora_")
        block, projection = module.rsplit(".", 1)
        for on_disk, projections in fused.items():
            if projection in projections:
                projection = on_disk
        published = f"{PEFT_PREFIX}model.{block}.{projection}.lora_{matrix}"
        parts.setdefault(published, []).append(parameter)
    # projections that are one module on disk share A; their B are stacked
    return {name: tensors[0] if ".lora_A." in name else torch.cat(tensors) for name, tensors in parts.items()}
