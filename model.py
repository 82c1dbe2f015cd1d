"""Libra = encoder -> connector -> decoder: read from published layouts, made from parts, computed, saved.

What a folder holds (a whole checkpoint, a PEFT adapter, a connector) is read from its files, never from its name, and
what is written here has the same layouts, so that others read it.
"""

import itertools
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import nn

from decoder import Cache, Decoder, DecoderConfig, decoder_config, family_of, names_of
from encoder import Encoder, EncoderConfig, encoder_config, encoder_tensors
from lora import LORA_SUPPORTED, LoRAConfig, add_lora, lora_parameters, merge_lora
from plumbing import checkpoint, cli
from plumbing.checkpoint import Source
from plumbing.files import atomic_folder, read_json, write_json
from plumbing.pixels import open_clip_pixels, pixel_config, preprocess
from tac import MLPConnector, make_connector
from tokenizer import IMAGE, IMAGE_END, IMAGE_START, IMAGE_TEXT, Tokenizer, template_of


@dataclass(frozen=True)
class LibraConfig:
    """The fields of config.json that tie encoder, connector and decoder together, with the published defaults."""

    mm_vision_tower: str
    mm_projector_type: str = "linear"
    mm_vision_select_layer: str | int = -2
    mm_vision_select_feature: str = "patch"
    image_aspect_ratio: str | None = None
    mm_image_pad: str | None = None  # ours: what a model was trained with
    mm_use_im_patch_token: bool = True
    mm_use_im_start_end: bool = False
    mm_vision_tower_config: str | None = None  # the two files of an open_clip encoder
    mm_vision_tower_checkpoint: str | None = None
    unfreeze_mm_vision_tower: bool = False
    use_maira_feature_norm: bool = False


SUPPORTED = dict(  # fields of config.json -> the values that we compute with
    mm_vision_select_feature=("patch", "cls_patch"),
    mm_image_pad=("mean", "black", "none"),
)
CONNECTOR_FILES = ("mm_projector.safetensors", "mm_tac_projector.bin", "mm_projector.bin")
CONNECTOR_FILE = re.compile(r"mm_\w*projector\w*\.(bin|safetensors)")
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
TRAINED_FILES = ("non_lora_trainables.bin",)
PREFIXES = {  # parameter names: published -> ours; the first that fits
    "model.mm_projector.": "connector.",
    "model.vision_tower.vision_tower.": "encoder.",
    "model.": "decoder.",
    "lm_head.": "decoder.lm_head.",
}
DEVICES = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available, "cpu": lambda: True}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LIBRA_KEYS = ("use_mm_proj", "image_aspect_ratio", "unfreeze_mm_vision_tower")  # in a config.json, beside mm_…
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "generation_config.json",
)  # fmt: skip


def libra_config(config: dict, source) -> LibraConfig:
    """A parsed config.json -> LibraConfig; ValueError that names the field where a value is not supported."""
    where = f"{source}/config.json"
    if "mm_vision_tower" not in config:
        raise ValueError(f"{where}: no mm_vision_tower: this is a language model, not a Libra checkpoint")
    for name, values in SUPPORTED.items():
        if name in config and config[name] not in values:
            allowed = " or ".join(map(repr, values))
            raise ValueError(f"{where}: {name} {config[name]!r} is not supported, only {allowed}")
    values = {field.name: config[field.name] for field in fields(LibraConfig) if field.name in config}
    layer = values.get("mm_vision_select_layer", -2)
    if layer != "all":
        try:
            values["mm_vision_select_layer"] = int(layer)
        except (TypeError, ValueError):
            raise ValueError(f"{where}: mm_vision_select_layer {layer!r} is neither 'all' nor a number") from None
    return LibraConfig(**values)


@dataclass(frozen=True)
class Parts:
    """What a model is made of: a config, a folder of weights, and what is laid over them."""

    weights: Source  # decoder, tokenizer; the connector and the encoder too where it is a whole checkpoint
    config: dict
    config_source: Source
    overlays: tuple[Path, ...] = ()  # files of tensors that win over those of the weights, later ones last
    adapters: tuple[Source, ...] = ()


def find_parts(place, base=None, relative_to: Path | None = None) -> Parts:
    """Where the parts of a model lie: a whole checkpoint, a PEFT adapter, a connector's folder or its file.

    base: the model under an adapter or a connector, instead of the one that it records. What a folder is, its files
    say. The topmost config.json counts, as published.
    """
    if Path(place).is_file() and CONNECTOR_FILE.fullmatch(Path(place).name):
        source, connector = Source(Path(place).parent), Path(place)
    else:
        source, connector = checkpoint.locate(place, relative_to), None
    config_file, adapter_file = (source.folder / name for name in ("config.json", "adapter_config.json"))
    is_adapter = connector is None and adapter_file.exists()
    needs_config = connector is None and not is_adapter
    config = read_json(config_file) if config_file.exists() or needs_config else {}
    if needs_config and not checkpoint.has_weights(source):
        connector = checkpoint.find_file(source, CONNECTOR_FILES)
    if connector is None and not is_adapter:
        if base:
            raise ValueError(f"{source} is a whole checkpoint: --base goes with an adapter or a connector")
        return Parts(source, config, source)
    recorded = read_json(adapter_file) if is_adapter else config
    recorded = recorded.get("base_model_name_or_path")
    if not (base or recorded):
        kind = "an adapter" if is_adapter else "a connector"
        raise ValueError(f"{connector or source} is {kind} and names no base model: give it with --base")
    try:
        below = find_parts(base) if base else find_parts(recorded, relative_to=source.folder)
    except RecursionError:
        raise ValueError(f"{connector or source} stands on itself: give its base with --base") from None
    overlay = checkpoint.find_file(source, TRAINED_FILES) if is_adapter else connector
    return Parts(
        below.weights,
        *((config, source) if "mm_vision_tower" in config else (below.config, below.config_source)),
        below.overlays + ((overlay,) if overlay else ()),
        below.adapters + ((source,) if is_adapter else ()),
    )


class Libra(nn.Module):
    """encoder -> connector -> decoder, with the tokenizer and the settings of its checkpoint.

    Made by `Libra.from_pretrained` or `Libra.from_parts`. Attributes: config, tokenizer, template (the name of its
    conversation template), image_text (what stands for the image in a question), pixels (how an image becomes pixels),
    eos_token_ids, vocabulary (ids that may be generated: 0 … vocabulary - 1), parts (where it was read from), base (the
    model that an adapter or a connector of this one would stand on), lora (its LoRAConfig, where one is not merged).
    """

    def __init__(self, config: LibraConfig, encoder: EncoderConfig, decoder: DecoderConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(encoder)
        layer, depth = config.mm_vision_select_layer, encoder.num_hidden_layers
        if layer != "all" and not -depth - 1 <= layer <= depth:
            raise ValueError(f"mm_vision_select_layer {layer} is none of the encoder's {depth} layers")
        self.connector = self.new_connector(config, encoder, decoder)
        self.decoder = Decoder(decoder)

    @staticmethod
    def new_connector(config: LibraConfig, encoder: EncoderConfig, decoder: DecoderConfig) -> nn.Module:
        layers = encoder.num_hidden_layers if config.mm_vision_select_layer == "all" else 1
        sizes = (layers, encoder.hidden_size, decoder.num_attention_heads, decoder.hidden_size)
        return make_connector(config.mm_projector_type, *sizes)

    @classmethod
    def from_pretrained(
        cls,
        source,
        *,
        base=None,
        encoder=None,
        device: str = "auto",
        dtype: str = "auto",
        merge: bool = True,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> "Libra":
        """Read a model in the published layout, for inference (nothing requires gradients).

        source: a folder or a hub id of a whole checkpoint, of an adapter in PEFT's layout or of a connector, or a
        connector's file. base: the model under an adapter or a connector, instead of the one that it records. encoder:
        folder or hub id, instead of the checkpoint's `mm_vision_tower`. device: auto (cuda, else mps, else cpu), cpu,
        cuda, mps. dtype: auto (float32 on the CPU, else the checkpoint's 16-bit type), stored (the checkpoint's),
        float32, bfloat16, float16. merge: fold an adapter into the layers it changes. progress(bytes done, bytes in
        all) is called as weights are read.
        ValueError, OSError or MemoryError, with one line, where the checkpoint, its encoder or its size do not fit.
        """
        parts = find_parts(source, base)
        libra = cls._read(parts, encoder, device, dtype, progress)
        for number, adapter in enumerate(parts.adapters, 1):
            load_adapter(libra, adapter)
            if merge or number < len(parts.adapters):
                merge_lora(libra.decoder)
                libra.base, libra.lora = adapter, None
        return libra.to(libra.dtype).eval().requires_grad_(False)

    @classmethod
    def from_parts(
        cls,
        decoder,
        encoder,
        connector: str = "TAC",
        *,
        connector_weights=None,
        select_layer: int = -2,
        template: str | None = None,
        pad: str = "black",
        device: str = "auto",
        dtype: str = "auto",
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> "Libra":
        """A new model from a stock language model and a stock encoder, with a fresh connector: where stage 1 begins.

        decoder, encoder: folders or hub ids. connector: TAC (reads every layer of the encoder), linear, mlp2x_gelu, …
        (reads select_layer; LLaVA's choice is the last but one). connector_weights: an `mm_*projector*` file to start
        it from, instead of torch's random state. template: conversation template; without it the family's. pad: how
        images become square, in training and after.
        """
        source, tower = checkpoint.locate(decoder), checkpoint.locate(encoder)
        config = read_json(source.folder / "config.json")
        family = family_of(config)
        decoder_config(config, source.folder)  # a family that we lack shows before its name is changed
        config |= dict(
            model_type="libra" if family == "llama" else f"libra_{family}",
            mm_vision_tower=tower.repository or str(tower.folder.resolve()),
            mm_projector_type=connector, mm_vision_select_layer="all" if connector == "TAC" else select_layer,
            mm_vision_select_feature="patch", mm_use_im_start_end=False, mm_use_im_patch_token=False, use_mm_proj=True,
            image_aspect_ratio="pad", mm_image_pad=pad,
        )  # fmt: skip
        if template:
            config["mm_conversation_template"] = template
        overlays = (Path(connector_weights),) if connector_weights else ()
        parts = Parts(source, config, source, overlays)
        libra = cls._read(parts, None, device, dtype, progress, fresh=not overlays)
        config |= dict(mm_hidden_size=libra.encoder.config.hidden_size, mm_conversation_template=libra.template)
        return libra.eval().requires_grad_(False)

    @classmethod
    def _read(cls, parts: Parts, encoder, device: str, dtype: str, progress, fresh: bool = False) -> "Libra":
        """The model without its adapters; fresh: with a connector that is drawn, not read."""
        device, raw, folder = find_device(device), parts.config, parts.config_source.folder
        dtype = find_dtype(dtype, device, raw)
        config, decoder = libra_config(raw, folder), decoder_config(raw, folder)
        tokenizer = Tokenizer(parts.weights.folder, sentencepiece_first=raw["model_type"] == "libra")
        stored = checkpoint.list_tensors(parts.weights)
        for file in parts.overlays:
            stored |= {_published(name): tensor for name, tensor in checkpoint.file_tensors(file).items()}
        groups = {ours: {} for ours in ("connector", "encoder", "decoder")}
        for name, tensor in stored.items():
            prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), "")
            part, ours = (PREFIXES.get(prefix, "decoder.") + name.removeprefix(prefix)).split(".", 1)
            groups[part][ours] = tensor
        if decoder.tie_word_embeddings:
            groups["decoder"].pop("lm_head.weight", None)
        beside = None if groups["connector"] or fresh else checkpoint.find_file(parts.weights, CONNECTOR_FILES)
        if beside:
            tensors = checkpoint.file_tensors(beside).items()
            groups["connector"] = {_published(name).split("mm_projector.")[-1]: tensor for name, tensor in tensors}

        tower, settings, encoder_stored = find_encoder(config, parts.config_source, encoder)
        if config.unfreeze_mm_vision_tower and "vision_cfg" not in settings:  # adapted weights win over the stock ones
            encoder_stored |= groups["encoder"]
        encoder_settings = encoder_config(settings, tower, encoder_stored, config.use_maira_feature_norm)
        with torch.device("meta"):
            libra = cls(config, encoder_settings, decoder)
        groups["encoder"] = encoder_tensors(libra.encoder, encoder_stored)
        groups["decoder"] = checkpoint.rename_tensors(groups["decoder"], names_of(raw), libra.decoder)
        connector_from = beside or (parts.overlays or (folder,))[-1]
        complaints = {
            "connector": f"the connector in {connector_from} is no {config.mm_projector_type}, as {folder} names it",
            "encoder": f"the weights in {tower} do not fit their config.json",
            "decoder": f"the weights in {parts.weights} do not fit {folder}/config.json",
        }
        tensors = {}
        for part, held in groups.items():
            if part == "connector" and fresh:
                continue
            checkpoint.check_fit(dict(getattr(libra, part).named_parameters()), held, complaints[part])
            tensors |= {f"{part}.{name}": tensor for name, tensor in held.items()}
        checkpoint.check_memory(sum(p.numel() for p in libra.parameters()) * dtype.itemsize, device, dtype)
        libra.to(dtype).to_empty(device=device)
        if fresh:
            libra.connector = cls.new_connector(config, encoder_settings, decoder).to(device, dtype)
        checkpoint.load_tensors({name: p for name, p in libra.named_parameters() if name in tensors}, tensors, progress)

        pad = config.mm_image_pad or ("mean" if config.image_aspect_ratio == "pad" else "none")
        if "vision_cfg" in settings:
            libra.pixels = open_clip_pixels(encoder_settings.image_size, pad)
        else:
            libra.pixels = pixel_config(read_json(tower.folder / "preprocessor_config.json"), tower, pad)
        libra.parts, libra.base, libra.lora = parts, parts.weights, None
        libra.tower, libra.encoder_stored = tower, groups["encoder"]
        libra.tokenizer, libra.template = tokenizer, template_of(raw, tokenizer)
        libra.eos_token_ids = eos_token_ids(parts.weights.folder, raw)
        # published loading adds these tokens and cuts the vocabulary to the tokenizer; rows beyond are never generated
        marks = [IMAGE_START, IMAGE_END] * config.mm_use_im_start_end
        tokenizer.add_special(["<im_patch>"] * config.mm_use_im_patch_token + marks)
        libra.image_text = f"{IMAGE_START}{IMAGE_TEXT}{IMAGE_END}" if marks else IMAGE_TEXT
        libra.vocabulary = min(decoder.vocab_size, len(tokenizer))
        if any(tokenizer.backend.token_to_id(mark) >= decoder.vocab_size for mark in marks):
            raise ValueError(f"{folder}: mm_use_im_start_end is set, but the embeddings have no rows for {marks}")
        return libra

    # ---------------------------------------------------------------------------------------- saving

    def save_pretrained(
        self, folder, dtype: torch.dtype | None = None, shard_size: int = 5 * 10**9, with_encoder: bool = False
    ):
        """Write the whole model in the published layout, LoRA merged; dtype None keeps each tensor's type.

        The encoder is written where it was trained (`unfreeze_mm_vision_tower`), else named; with_encoder puts a copy
        into folder/encoder and names that. The folder appears, or changes, when all of it is on the disk; OSError, and
        the old one as it was, where that fails.
        """
        if with_encoder and self.encoder.config.model_type == "open_clip":
            raise ValueError("an open_clip encoder is two files of its own: it is named, not copied")
        with atomic_folder(folder) as partial:
            config = self._config(Path(folder)) | {"torch_dtype": str(dtype or self.dtype).removeprefix("torch.")}
            if with_encoder:
                config["mm_vision_tower"] = "encoder"
                self._save_encoder(partial / "encoder")
            write_json(partial / "config.json", config)
            _copy(self.parts.weights.folder, TOKENIZER_FILES, partial)
            connector = ((f"model.mm_projector.{name}", p) for name, p in self.connector.named_parameters())
            tower = self._encoder_tensors() if self.config.unfreeze_mm_vision_tower else ()
            if self.encoder.config.model_type == "open_clip":  # published loading ignores one inside a checkpoint
                tower = ()
            tower = ((f"model.vision_tower.vision_tower.{name}", tensor) for name, tensor in tower)
            tensors = itertools.chain(self._decoder_tensors(), connector, tower)
            tensors = ((name, tensor.to(dtype or tensor.dtype)) for name, tensor in tensors)
            checkpoint.write_tensors(partial, tensors, shard_size)

    def save_parts(self, folder):
        """Write encoder and language model as stock parts, in folders of their own below this one."""
        folder, config = Path(folder), self.parts.config
        self._save_encoder(folder / "encoder")
        with atomic_folder(folder / "decoder") as partial:
            decoder = {
                name: value for name, value in config.items() if not name.startswith("mm_") and name not in LIBRA_KEYS
            }
            write_json(partial / "config.json", decoder | {"model_type": family_of(config)})
            _copy(self.parts.weights.folder, TOKENIZER_FILES, partial)
            checkpoint.write_tensors(partial, self._decoder_tensors())

    def _save_encoder(self, folder):
        with atomic_folder(folder) as partial:
            _copy(self.tower.folder, ("config.json", "preprocessor_config.json"), partial)
            checkpoint.write_tensors(partial, self._encoder_tensors())

    def save_connector(self, folder):
        """Write the connector alone, under the published names, and a config.json that records the model below it."""
        with atomic_folder(folder) as partial:
            tensors = {f"model.mm_projector.{name}": p for name, p in self.connector.named_parameters()}
            write_json(partial / "config.json", self._config(Path(folder)) | self._base(Path(folder)))
            checkpoint.write_safetensors(partial / CONNECTOR_FILES[0], tensors)
            checkpoint.write_bin(partial / CONNECTOR_FILES[-1], tensors)

    def save_adapter(self, folder):
        """Write LoRA in PEFT's layout and the base's name; beside it `non_lora_trainables.bin`, as published.

        That holds the connector, and the encoder where it was trained.
        """
        names = names_of(self.parts.config)
        tensors = {}
        for name, parameter in lora_parameters(self.decoder).items():
            module, _, rest = name.partition(".lora_")
            head, last = module.rsplit(".", 1)
            whole = next((w for w in names.fused if last in names.fused[w] and w in self.lora.target_modules), last)
            tensors.setdefault(f"base_model.model.model.{head}.{whole}.lora_{rest}", []).append(parameter)
        stack = lambda name, parts: parts[0] if ".lora_A." in name else torch.cat(parts)
        record = LORA_SUPPORTED | asdict(self.lora) | dict(task_type="CAUSAL_LM", inference_mode=True)
        record |= self._base(Path(folder)) | {"target_modules": list(self.lora.target_modules)}
        trained = {f"base_model.model.model.mm_projector.{name}": p for name, p in self.connector.named_parameters()}
        if self.config.unfreeze_mm_vision_tower:
            prefix = "base_model.model.model.vision_tower.vision_tower."
            trained |= {prefix + name: tensor for name, tensor in self._encoder_tensors()}
        with atomic_folder(folder) as partial:
            write_json(partial / "config.json", self._config(Path(folder)))
            write_json(partial / "adapter_config.json", record)
            held = {name: stack(name, parts) for name, parts in tensors.items()}
            checkpoint.write_safetensors(partial / ADAPTER_FILES[0], held)
            checkpoint.write_bin(partial / TRAINED_FILES[0], trained)

    def _config(self, folder: Path) -> dict:
        """config.json as it reads from a folder: paths of this machine are relative to it."""
        config = {name: value for name, value in self.parts.config.items() if name != "base_model_name_or_path"}
        if self.encoder.config.model_type != "open_clip":
            return config | {"mm_vision_tower": _place(self.tower, folder)}
        names = ("mm_vision_tower_config", "mm_vision_tower_checkpoint")
        return config | {name: f"{_place(self.tower, folder)}/{Path(config[name]).name}" for name in names}

    def _base(self, folder: Path) -> dict:
        return {"base_model_name_or_path": _place(self.base, folder)}

    def _decoder_tensors(self):
        """(published name, tensor) of the decoder, LoRA merged."""
        weights: dict[str, Callable[[], torch.Tensor]] = {}
        for name, parameter in self.decoder.named_parameters():
            if name.endswith(".base_layer.weight"):
                name = name.removesuffix(".base_layer.weight")
                weights[f"{name}.weight"] = self.decoder.get_submodule(name).merged
            elif ".lora_" not in name:
                weights[name.replace(".base_layer.", ".")] = lambda parameter=parameter: parameter
        for whole, (first, *others) in names_of(self.parts.config).fused.items():
            for name in [name for name in weights if f".{first}." in name]:
                parts = [weights.pop(name.replace(f".{first}.", f".{part}.")) for part in (first, *others)]
                weights[name.replace(f".{first}.", f".{whole}.")] = lambda parts=parts: torch.cat([p() for p in parts])
        for name, tensor in weights.items():
            yield name if name == "lm_head.weight" else f"model.{name}", tensor()

    def _encoder_tensors(self):
        """(name in its own repository, tensor) of the encoder."""
        for name, parameter in self.encoder.named_parameters():
            stored = self.encoder_stored[name]
            yield stored.name.removeprefix("model.vision_tower.vision_tower."), parameter.view(stored.shape)

    # ---------------------------------------------------------------------------------------- computing

    @property
    def device(self):
        return self.decoder.norm.weight.device

    @property
    def dtype(self):
        return self.decoder.norm.weight.dtype

    @property
    def image_positions(self) -> int:
        """Positions that an image takes in the prompt."""
        patches = (self.pixels.crop // self.encoder.config.patch_size) ** 2
        keeps_class = self.encoder.config.class_token and self.config.mm_vision_select_feature == "cls_patch"
        return patches + keeps_class

    def preprocess(self, images) -> torch.Tensor:
        """PIL images in mode RGB -> pixels [len(images), 3, S, S], on the model's device and in its type."""
        return torch.stack([preprocess(image, self.pixels) for image in images]).to(self.device, self.dtype)

    def features(self, pixels) -> torch.Tensor:
        """pixels [2, 3, S, S] of (current, prior), or [1, 3, S, S] without a prior -> features [2, L, N, C].

        Without a prior the current image stands for it, encoded once.
        """
        config = self.config
        features = self.encoder(pixels, config.mm_vision_select_layer, config.mm_vision_select_feature)
        return features.expand(2, -1, -1, -1)

    def embed_images(self, pixels) -> torch.Tensor:
        """pixels of one study, as for `features` -> image embeddings [N, hidden]."""
        return self.embed_batch([pixels])[0]

    def embed_batch(self, studies: list[torch.Tensor]) -> torch.Tensor:
        """pixels of each study, as for `features` -> image embeddings [B, N, hidden].

        All images go through the encoder together, each once; gradients reach it where it learns.
        """
        if isinstance(self.connector, MLPConnector) and self.connector.images == 1:  # half the encoder's work
            studies = [pixels[:1] for pixels in studies]
        counts = torch.tensor([len(pixels) for pixels in studies])
        weight, config = self.encoder.patch_embed.weight, self.config
        pixels = torch.cat(studies).to(self.device, weight.dtype)
        with torch.set_grad_enabled(torch.is_grad_enabled() and weight.requires_grad):
            features = self.encoder(pixels, config.mm_vision_select_layer, config.mm_vision_select_feature)
        first = counts.cumsum(0) - counts  # of each study's images: the current, and the prior or again the current
        pairs = torch.stack((first, first + counts - 1), 1).to(self.device)
        features = features.unflatten(0, (-1, 2)) if bool((counts == 2).all()) else features[pairs]  # [B, 2, L, N, C]
        return self.connector(features)

    def splice(self, ids: list[int], image_embeddings) -> torch.Tensor:
        """ids with one IMAGE, and what stands in its place [N, hidden] -> embeddings [T, hidden]."""
        embed = lambda ids: self.decoder.embed_tokens(torch.tensor(ids, dtype=torch.long, device=self.device))
        if IMAGE not in ids:
            return embed(ids)
        at = ids.index(IMAGE)
        return torch.cat((embed(ids[:at]), image_embeddings, embed(ids[at + 1 :])))

    def logits(self, hidden) -> torch.Tensor:
        """hidden [..., C] -> logits [..., V], float32, of the ids that may be generated."""
        return self.decoder.head(hidden, self.vocabulary).float()

    def extend(self, cache: Cache, study: int, embeddings) -> torch.Tensor:
        """Prefill one study's next positions, embeddings [T, hidden], and return the logits [V] behind the last."""
        positions = cache.lengths[study] + torch.arange(len(embeddings), device=self.device)
        lengths = cache.lengths[study : study + 1] + len(embeddings)
        hidden = self.decoder(embeddings[None], positions[None], cache.prefill(study), lengths)
        cache.lengths[study] += len(embeddings)
        return self.logits(hidden[0, -1])

    def step(self, cache: Cache, tokens: list[list[int]]) -> torch.Tensor:
        """One decoding step: the newest ids of K continuations of B studies, [B][K] -> logits [B, K, V]."""
        embeddings = self.decoder.embed_tokens(torch.tensor(tokens, device=self.device))
        positions = (cache.lengths[:, None] + cache.steps).expand(-1, embeddings.shape[1])  # [B, K]
        hidden = self.decoder(embeddings, positions, cache.step(), cache.lengths)
        cache.steps += 1
        return self.logits(hidden)


def _published(name: str) -> str:
    """A published tensor's name, less what PEFT and the trainers put before it."""
    if "mm_projector." in name:
        return f"model.mm_projector.{name.split('mm_projector.', 1)[1]}"
    return name.removeprefix("base_model.model.")


def _copy(source: Path, names, folder: Path):
    for name in names:
        if (source / name).exists():
            shutil.copy(source / name, folder)


def _place(source: Source, folder: Path) -> str:
    """A checkpoint's hub id, or its path as it reads from a folder."""
    return source.repository or os.path.relpath(source.folder.resolve(), folder.resolve())


def find_encoder(config: LibraConfig, source: Source, encoder=None) -> tuple[Source, dict, dict]:
    """Where an image encoder lies, its config.json, and its tensors by their names on disk.

    encoder: folder or hub id instead of the checkpoint's. An open_clip encoder is two files, at the paths that the
    checkpoint's config gives or beside that config.
    """
    if encoder or not config.mm_vision_tower_config:
        tower = checkpoint.locate(encoder) if encoder else checkpoint.locate(config.mm_vision_tower, source.folder)
        return tower, read_json(tower.folder / "config.json"), checkpoint.list_tensors(tower)
    files = []
    for name in (config.mm_vision_tower_config, config.mm_vision_tower_checkpoint or ""):
        place = source.folder / name
        files.append(place if place.is_file() else checkpoint.find_file(source, [place.name]))
        if files[-1] is None:
            raise FileNotFoundError(f"{source} lacks the encoder's file {name}, also beside its config.json: fetch it")
    return Source(files[0].parent), read_json(files[0]), checkpoint.file_tensors(files[1])


def load_adapter(libra: Libra, source: Source):
    """Put a LoRA adapter in PEFT's layout beside a model's layers; ValueError where it does not fit."""
    where = source.folder / "adapter_config.json"
    raw = read_json(where)
    for name, value in LORA_SUPPORTED.items():
        if raw.get(name) and raw[name] != value:
            raise ValueError(f"{where}: {name} {raw[name]!r} is not supported, only {value!r}")
    if lacking := [name for name in ("r", "lora_alpha") if name not in raw]:
        raise ValueError(f"{where} lacks {' and '.join(lacking)}")
    file = checkpoint.find_file(source, ADAPTER_FILES)
    if file is None:
        raise FileNotFoundError(f"{source} holds no adapter ({' or '.join(ADAPTER_FILES)}): fetch it again")
    clean = lambda name: re.sub(r"^base_model\.model\.model\.|(?<=lora_[AB])\.default(?=\.weight$)", "", name)
    stored = {clean(name): tensor for name, tensor in checkpoint.file_tensors(file).items()}
    held = sorted({name.split(".lora_")[0].split(".")[-1] for name in stored})
    named = raw.get("target_modules", held)
    if isinstance(named, list) and sorted(named) != held:
        raise ValueError(f"{where} names the targets {sorted(named)}, {file.name} holds {held}: fetch both again")
    libra.lora = LoRAConfig(
        raw["r"], raw["lora_alpha"], tuple(held), raw.get("lora_dropout") or 0.0, bool(raw.get("use_rslora"))
    )
    names = names_of(libra.parts.config)
    add_lora(libra.decoder, names, libra.lora)
    tensors, parameters = checkpoint.rename_tensors(stored, names, libra.decoder), lora_parameters(libra.decoder)
    checkpoint.check_fit(parameters, tensors, f"the adapter in {source} does not fit its base {libra.base}")
    checkpoint.load_tensors(parameters, tensors)


def find_device(name: str) -> torch.device:
    if name == "auto":
        name = next(device for device, available in DEVICES.items() if available())
    kind = name.split(":")[0]
    if kind not in DEVICES or not DEVICES[kind]():
        available = " and ".join(device for device, available in DEVICES.items() if available())
        raise ValueError(f"device {name!r} is not available here: there is {available}")
    return torch.device(name)


def find_dtype(name: str, device: torch.device, config: dict) -> torch.dtype:
    recorded = config.get("torch_dtype") or config.get("dtype")
    if name == "auto":
        name = "float32" if device.type == "cpu" else recorded if recorded in ("float16", "bfloat16") else "bfloat16"
    if name == "stored":
        name = recorded or "float32"
    if name not in DTYPES:
        raise ValueError(f"dtype {name!r} is not one of auto, stored, {', '.join(DTYPES)}")
    return DTYPES[name]


NEUTRAL = {  # settings of generation_config.json that `generate` does not have -> the values that change nothing
    "repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0, "min_length": 0, "min_new_tokens": 0, "min_p": 0,
    "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "diversity_penalty": 0.0, "num_beam_groups": 1,
    "early_stopping": False, "renormalize_logits": False, "penalty_alpha": 0,
    "bad_words_ids": None, "force_words_ids": None, "forced_bos_token_id": None, "forced_eos_token_id": None,
    "suppress_tokens": None, "begin_suppress_tokens": None, "sequence_bias": None,
    "exponential_decay_length_penalty": None, "guidance_scale": None,
}  # fmt: skip


def eos_token_ids(folder: Path, config: dict) -> list[int]:
    """The ids that end a report; other settings of generation_config.json that would change one warn, once."""
    file = folder / "generation_config.json"
    generation = read_json(file) if file.exists() else {}
    for name, neutral in NEUTRAL.items():
        if generation.get(name) not in (None, neutral):
            warnings.warn(f"{file}: {name} {generation[name]!r} is not applied", stacklevel=2)
    eos = generation.get("eos_token_id")
    eos = config.get("eos_token_id") if eos is None else eos
    return eos if isinstance(eos, list) else [] if eos is None else [eos]


# ------------------------------------------------------------------------------------------ command line


def main(arguments):
    libra = Libra.from_pretrained(
        arguments.model, base=arguments.base, device="cpu", dtype=arguments.dtype,
        progress=cli.progress(f"loading {arguments.model}", "GiB", 2**30),
    )  # fmt: skip
    libra.save_pretrained(arguments.out, with_encoder=arguments.with_encoder)
    print(f"{arguments.out}: {sum(p.numel() for p in libra.parameters()) / 1e6:.1f} M parameters")


if __name__ == "__main__":
    PARSER = cli.Parser(prog="model.py", description="Merge an adapter or a connector into its base; convert; save.")
    PARSER.add_argument("--model", required=True, metavar="ID_OR_DIR", help="checkpoint, adapter or connector")
    PARSER.add_argument("--base", metavar="ID_OR_DIR", help="model under it, instead of the one that it records")
    PARSER.add_argument("--out", required=True, metavar="DIR", help="folder to write; an old checkpoint is replaced")
    PARSER.add_argument("--with-encoder", action="store_true", help="the image encoder, too, in DIR/encoder")
    PARSER.add_argument("--dtype", default="stored", choices=("stored", *DTYPES), help="of the weights (stored)")
    sys.exit(cli.guard("model.py", main, PARSER.parse_args()))
