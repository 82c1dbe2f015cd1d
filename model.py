"""Libra = image encoder -> connector -> language model (Zhang et al., Findings of ACL 2025, section 3).

    pixels [2, 3, S, S] of (current, prior)
      -> features [2, L, N, C]          encoder.py: every layer's output for each of N patches
      -> image embeddings [N, hidden]   tac.py: one sequence for both images
      -> spliced into the prompt        tokenizer.py makes its ids
      -> logits [T, V]                  decoder.py

This file defines the model, its forward passes and its training loss. `sample.py` writes reports with it, `train.py`
trains it, `plumbing/layout.py` knows which published file holds which part. "Published", here and everywhere, means the
paper's code at https://github.com/X-iZhang/Libra.
"""

if __name__ == "__main__":
    import plumbing.start  # noqa: F401 (first of all)


import argparse
import sys
from collections.abc import Callable
from inspect import signature
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from data import IGNORED, Batch
from decoder import Cache, Decoder, DecodingStep, Prefill, WholeRows
from encoder import Encoder
from lora import LoRAConfig, add_lora, merge_lora
from plumbing import layout
from plumbing.checkpoint import Source, locate
from plumbing.cli import Parser, guard, progress
from plumbing.families import names_of
from plumbing.layout import DTYPES, EncoderFiles, LibraConfig, find_dtype
from plumbing.pixels import PixelConfig, preprocess
from plumbing.quantised import KINDS, kind_of, quantise_linears
from tac import MLPConnector, TACPart
from tokenizer import IMAGE, IMAGE_END, IMAGE_START, IMAGE_TEXT, Tokenizer, template_of

# positions whose logits are in memory at once in training; 1024 positions × 32,000 ids take 131 MB
LOSS_CHUNK = 1024


class Libra(nn.Module):
    """A model with its tokenizer and settings. Make one with `Libra.from_pretrained` or `Libra.from_parts`."""

    def __init__(
        self,
        config: LibraConfig,
        encoder: Encoder,
        connector: nn.Module,
        decoder: Decoder,
        tokenizer: Tokenizer,
        pixels: PixelConfig,
        eos_token_ids: list[int],
        weights: Source,
        encoder_files: EncoderFiles,
        base: Source,
    ):
        """pixels: how an image becomes pixels. eos_token_ids: the ids that end a report.

        weights, encoder_files: where the model was read from. base: the model that a saved adapter or connector of
        this one records as its base.
        """
        super().__init__()
        # what computes
        self.config = config
        self.encoder = encoder
        self.connector = connector
        self.decoder = decoder
        # what surrounds it
        self.tokenizer = tokenizer
        self.pixels = pixels
        self.eos_token_ids = eos_token_ids
        # where it came from, which saving needs
        self.weights = weights
        self.encoder_files = encoder_files
        self.base = base
        self.lora: LoRAConfig | None = None  # of an adapter that is not merged

        # the name of the conversation template, and what stands for the image in a question
        self.template = template_of(config.json, tokenizer)
        self.image_text = IMAGE_TEXT
        if config.mm_use_im_start_end:
            self.image_text = f"{IMAGE_START}{IMAGE_TEXT}{IMAGE_END}"
        # ids below this one may be generated. Published loading cuts the embeddings to the tokenizer's length.
        self.vocabulary = min(decoder.config.vocab_size, len(tokenizer))

    # ---------------------------------------------------------------------------------------- reading

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
        changes: dict | None = None,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> "Libra":
        """Reads a model in the published layout, for inference: nothing requires gradients.

        source: folder or hub id of a checkpoint, a PEFT adapter or a connector; or a connector's file.
        base: the model under an adapter or a connector, instead of the one that it records.
        encoder: folder or hub id, instead of the checkpoint's `mm_vision_tower`.
        device: auto (cuda, else mps, else cpu), cpu, cuda, mps.
        dtype: auto (float32 on the CPU, else the checkpoint's 16-bit type), stored, float32, bfloat16, float16; int8,
            int4: the decoder's linear layers in 8 or 4 bits (plumbing/quantised.py), everything else as with auto.
        merge: add an adapter's update into the weights; int8 and int4 always do.
        changes: fields of config.json to override; they are saved with the model.
        progress(bytes done, bytes in all) is called while weights are read.

        ValueError, OSError or MemoryError with one line where something is missing or does not fit.
        """
        # the model itself; an adapter's connector and encoder are read here, too
        files = layout.find_model_files(source, base)
        options = dict(encoder=encoder, device=device, dtype=dtype, changes=changes, progress=progress)
        libra = cls(**layout.read_model(files, **options))
        # adapters on top of it; only the last one can stay unmerged
        for number, adapter in enumerate(files.adapters, start=1):
            layout.load_adapter(libra, adapter)
            is_last = number == len(files.adapters)
            if merge or not is_last or dtype in KINDS:
                libra.merge_lora(adapter)
        # the adapters' sums are rounded, not their parts
        if files.adapters and dtype in KINDS:
            quantise_linears(libra.decoder, dtype)
            libra.decoder.join()
        # an adapter's own type may differ
        if libra.lora:
            libra.to(libra.dtype)
        return libra.eval().requires_grad_(False)

    @classmethod
    def from_parts(
        cls,
        decoder,
        encoder,
        connector: str = "TAC",
        *,
        connector_weights=None,
        without: tuple[TACPart, ...] = (),
        select_layer: int = -2,
        template: str | None = None,
        pad: str = "black",
        device: str = "auto",
        dtype: str = "auto",
        changes: dict | None = None,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> "Libra":
        """Makes a new model from a stock language model, a stock encoder and a fresh connector: where stage 1 starts.

        decoder, encoder: folders or hub ids.
        connector: TAC (reads every encoder layer), or linear, mlp2x_gelu, … (read select_layer, as LLaVA's).
        connector_weights: an `mm_*projector*` file, instead of torch's random initial values.
        without: parts that TAC does not have; config.json records them.
        template: conversation template, instead of the family's. pad: how images become square.
        device, dtype, changes, progress: as for `from_pretrained`.
        """
        # describe the new model as a config.json would
        source, tower = locate(decoder), locate(encoder)
        json = layout.new_config(source, tower, connector, select_layer, pad)
        if template:
            json["mm_conversation_template"] = template
        if without:
            json["mm_tac_without"] = list(without)
        # read the parts; a connector without weights keeps torch's random state
        overlays = (Path(connector_weights),) if connector_weights else ()
        files = layout.ModelFiles(source, json, source, overlays)
        options = dict(device=device, dtype=dtype, changes=changes or {}, progress=progress)
        libra = cls(**layout.read_model(files, fresh_connector=not overlays, **options))
        return libra.eval().requires_grad_(False)

    def with_decoder(self, decoder: Decoder) -> "Libra":
        """This model with another decoder; everything else is shared."""
        settings = {name: getattr(self, name) for name in signature(Libra).parameters}
        settings["decoder"] = decoder
        return Libra(**settings)

    def add_lora(self, config: LoRAConfig):
        """Puts a fresh LoRA beside the decoder's layers and freezes the rest of the decoder."""
        if kind := kind_of(self.decoder):
            problem = f"{self.base} has {kind} weights, which take no adapter"
            raise ValueError(f"{problem}: use the model that it was made from")
        add_lora(self.decoder, names_of(self.config.json), config)
        self.lora = config

    def merge_lora(self, adapter: Source):
        """Adds the LoRA, which was read from `adapter`, into the decoder's weights."""
        merge_lora(self.decoder)
        self.lora, self.base = None, adapter

    # ---------------------------------------------------------------------------------------- saving

    def save_pretrained(
        self,
        folder,
        dtype: torch.dtype | None = None,
        shard_size: int = 5 * 10**9,
        with_encoder: bool = False,
    ):
        """Writes the whole model in the published layout, LoRA merged. dtype None keeps each tensor's type.

        The encoder is written if it was trained (`unfreeze_mm_vision_tower`), else only named; with_encoder puts a
        copy into folder/encoder instead. The folder changes when all of it is on the disk; OSError leaves the old one.
        """
        layout.write_model(self, folder, dtype, shard_size, with_encoder)

    def save_parts(self, folder):
        """Writes encoder and language model as stock ones, into folder/encoder and folder/decoder."""
        if kind := kind_of(self.decoder):
            raise ValueError(f"other programs do not know these {kind} weights: load the model in another dtype")
        layout.write_encoder(self, Path(folder) / "encoder")
        layout.write_language_model(self, Path(folder) / "decoder")

    def save_connector(self, folder):
        """Writes the connector alone, under its published names, and a config.json that records the model below it."""
        layout.write_connector(self, folder)

    def save_adapter(self, folder):
        """Writes LoRA in PEFT's layout, and beside it, as published, `non_lora_trainables.bin` with the connector
        and a trained encoder."""
        layout.write_adapter(self, folder)

    # ---------------------------------------------------------------------------------------- images

    @property
    def device(self) -> torch.device:
        return self.decoder.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.norm.weight.dtype

    @property
    def image_positions(self) -> int:
        """Number of positions that a study's images take in the prompt, both together."""
        # one position per patch
        patches = (self.pixels.crop // self.encoder.config.patch_size) ** 2
        keeps_class_token = self.config.mm_vision_select_feature == "cls_patch" and self.encoder.config.class_token
        return patches + keeps_class_token

    def preprocess(self, images) -> torch.Tensor:
        """PIL images in mode RGB -> pixels [len(images), 3, S, S], on the model's device and in its type."""
        pixels = [preprocess(image, self.pixels) for image in images]
        return torch.stack(pixels).to(self.device, self.dtype)

    def encode(self, pixels) -> torch.Tensor:
        """pixels [images, 3, S, S] -> features [images, L, N, C] of the layers that the connector reads."""
        return self.encoder(pixels, self.config.mm_vision_select_layer, self.config.mm_vision_select_feature)

    def features(self, pixels) -> torch.Tensor:
        """pixels [2, 3, S, S] of (current, prior), or [1, 3, S, S] without a prior -> features [2, L, N, C].

        Without a prior, the current image takes its place (as published) and is encoded once.
        """
        return self.encode(pixels).expand(2, -1, -1, -1)

    def embed_images(self, pixels) -> torch.Tensor:
        """pixels of one study, as for `features` -> image embeddings [N, hidden]."""
        return self.embed_batch([pixels])[0]

    def embed_batch(self, studies: list[torch.Tensor]) -> torch.Tensor:
        """pixels of B studies, each as for `features` -> image embeddings [B, N, hidden].

        All images go through the encoder together, each once.
        """
        # a connector that looks at the current image alone needs half of the encoder's work
        if isinstance(self.connector, MLPConnector) and self.connector.images == 1:
            studies = [pixels[:1] for pixels in studies]
        weight = self.encoder.patch_embed.weight
        pixels = torch.cat(studies).to(self.device, weight.dtype)  # [images, 3, S, S]
        # a frozen encoder needs no gradients, and keeps nothing for them
        with torch.set_grad_enabled(torch.is_grad_enabled() and weight.requires_grad):
            features = self.encode(pixels)  # [images, L, N, C]

        # (current, prior) of each study, or twice the current image:
        #     images of the studies   a b | c | d e
        #     counts                  2     1   2
        #     pairs                   0 1   2 2  3 4
        counts = torch.tensor([len(pixels) for pixels in studies])
        first = counts.cumsum(0) - counts
        if bool((counts == 2).all()):
            features = features.unflatten(0, (-1, 2))  # [B, 2, L, N, C], no copy
        else:
            pairs = torch.stack((first, first + counts - 1), 1)
            features = features[pairs.to(self.device)]  # [B, 2, L, N, C]
        return self.connector(features)

    # ---------------------------------------------------------------------------------------- text

    def embed_ids(self, ids: list[int]) -> torch.Tensor:
        """T ids without an image -> embeddings [T, hidden]."""
        ids = torch.tensor(ids, dtype=torch.long, device=self.device)
        return self.decoder.embed_tokens(ids)

    def splice(self, ids: list[int], image_embeddings) -> torch.Tensor:
        """ids with one IMAGE, and image embeddings [N, hidden] for its place -> embeddings [T, hidden].

            ids          5 9 IMAGE 7     T = 3 + N
            embeddings   5 9 i i … i 7
        """
        if IMAGE not in ids:
            return self.embed_ids(ids)
        place = ids.index(IMAGE)
        before = self.embed_ids(ids[:place])
        after = self.embed_ids(ids[place + 1 :])
        return torch.cat((before, image_embeddings, after))

    def logits(self, hidden) -> torch.Tensor:
        """hidden [..., C] -> logits [..., V], float32, of the ids that may be generated."""
        return self.decoder.head(hidden, self.vocabulary).float()

    def prefill(self, cache: Cache, row: int, embeddings) -> torch.Tensor:
        """Adds the next positions of one row's prompt, embeddings [T, hidden], to the cache.

        Returns the logits [V] of the next token.
        """
        # the new positions follow the stored ones
        T, start = len(embeddings), int(cache.lengths[row])
        positions = torch.arange(start, start + T, device=self.device)
        lengths = cache.lengths[row : row + 1] + T
        attend = Prefill(cache, row, start)
        hidden = self.decoder(embeddings[None], positions[None], attend, lengths)  # [1, T, hidden]
        # every layer has stored its keys and values
        cache.advance(T, row)
        logits = self.logits(hidden[0, -1])
        # without this check, a report of nonsense would look like a report
        if not logits.isfinite().all():
            raise ValueError("the logits are not finite numbers: the weights are damaged, or too large for this dtype")
        return logits

    def decode_step(self, cache: Cache, tokens: list[list[int]]) -> torch.Tensor:
        """Adds the newest token of K continuations of the B active rows, tokens [B][K].

        Returns the next logits [B, K, V].
        """
        # the dimension of positions holds the K continuations of a study
        embeddings = self.decoder.embed_tokens(torch.tensor(tokens, device=self.device))  # [B, K, hidden]
        lengths = cache.lengths[cache.active]  # [B]
        positions = lengths[:, None] + cache.newest  # [B, 1]: all continuations of a study are equally long
        positions = positions.expand(-1, embeddings.shape[1])  # [B, K]
        hidden = self.decoder(embeddings, positions, DecodingStep(cache), lengths)
        cache.advance(1)
        return self.logits(hidden)

    def compile_step(self):
        """Compiles the decoding step with `torch.compile`. The first reports take longer, by some 20 seconds on a CPU.

        ValueError where it does not work: it needs a C++ compiler on a CPU and Triton on a GPU.
        """
        # a trial, because the first real step comes after the images were computed
        try:
            torch.compile(torch.neg)(torch.ones(2, device=self.device))
        except (RuntimeError, ImportError, OSError) as error:
            reason = str(error).strip().split("\n")[0]
            raise ValueError(f"torch.compile does not work on this machine ({reason}): leave out --compile") from None
        self.decoder.compile_step()

    # ---------------------------------------------------------------------------------------- training

    def loss(self, batch: Batch) -> torch.Tensor:
        """Sum of the cross-entropies of all labels of a batch. Only positions before a label reach the head."""
        ids = batch.ids.to(self.device)  # [B, T], as all of these
        labels = batch.labels.to(self.device)
        segments = batch.segments.to(self.device)
        positions = batch.positions.to(self.device)

        # 1) embed ids and images; every row with an image has N places for it, in the batch's order
        # IMAGE (-200) becomes id 0 for a moment; the image embeddings replace it
        embeddings = self.decoder.embed_tokens(ids.clamp(0))  # [B, T, hidden]
        pixels = [pixels for pixels in batch.pixels if pixels is not None]
        if pixels:
            images = self.embed_batch(pixels).to(embeddings.dtype)  # [rows with an image, N, hidden]
            embeddings = embeddings.masked_scatter((ids == IMAGE)[..., None], images)

        # 2) decode. Without continuations no mask is needed: padding is on the right, where causal rows do not look
        attend = WholeRows(self.decoder.config)
        if bool((segments > 0).any()):
            attend = WholeRows(self.decoder.config, segments, positions)
        hidden = self.decoder(embeddings, positions, attend)

        # 3) the position before a label predicts it
        is_learnt = labels[:, 1:] != IGNORED
        hidden = hidden[:, :-1][is_learnt]  # [labels, hidden]
        labels = labels[:, 1:][is_learnt]  # [labels]
        if len(labels) <= LOSS_CHUNK:
            return self._cross_entropy(hidden, labels)
        # logits are large: keep those of one chunk at a time, and compute them again in the backward pass
        total = 0.0
        chunks = zip(hidden.split(LOSS_CHUNK), labels.split(LOSS_CHUNK), strict=True)
        for some_hidden, some_labels in chunks:
            total = total + checkpoint(self._cross_entropy, some_hidden, some_labels, use_reentrant=False)
        return total

    def _cross_entropy(self, hidden, labels) -> torch.Tensor:
        return F.cross_entropy(self.logits(hidden), labels, reduction="sum")


# ------------------------------------------------------------------------------------------ command line


def parse(arguments=None):
    about = "Merge an adapter or a connector into its base; convert; save."
    parser = Parser(prog="model.py", description=about, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, metavar="ID_OR_DIR", help="checkpoint, adapter or connector")
    add("--base", metavar="ID_OR_DIR", help="model under it, instead of the one that it records")
    add("--out", required=True, metavar="DIR", help="folder to write; an old checkpoint is replaced")
    add("--with-encoder", action="store_true", help="save the image encoder, too, in DIR/encoder")
    text = "type of the weights; int8, int4: those of the decoder in so many bits, the rest as stored"
    add("--dtype", default="stored", choices=("stored", *DTYPES, *KINDS), help=text)
    return parser.parse_args(arguments)


def convert(arguments):
    options = dict(base=arguments.base, device="cpu", dtype=arguments.dtype)
    options["progress"] = progress("loading", "GiB", 2**30)
    libra = Libra.from_pretrained(arguments.model, **options)
    # computed in float32, saved as the rest of the checkpoint was
    stored = None
    if arguments.dtype in KINDS:
        stored = find_dtype("stored", libra.device, libra.config.json)
    libra.save_pretrained(arguments.out, stored, with_encoder=arguments.with_encoder)
    count = sum(parameter.numel() for parameter in libra.parameters())
    print(f"{arguments.out}: {count / 1e6:.1f} M parameters")


def main(arguments=None) -> int:
    return guard("model.py", convert, parse(arguments))


if __name__ == "__main__":
    sys.exit(main())
