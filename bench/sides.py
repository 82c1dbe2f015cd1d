"""The pieces of work that `python -m bench` measures, done by us and by `transformers` and `peft`."""

import warnings
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn

from bench import costs
from data import IGNORED, Batch, Row, Study, collate, share_prefix
from decoder import Cache
from lora import PROJECTIONS
from model import Libra
from sample import generate, prompt_of
from tokenizer import IMAGE
from train import TrainConfig, build

NEW = 64  # tokens of a report
BEAMS = {"greedy": 1, "beams": 10}
DECODING = ("encoder", "prefill", *BEAMS)
TRAINING = {"step": (4, 1), "questions": (1, 4), "lora": (2, 1)}  # pairs of images, questions about each


class Mode(NamedTuple):
    """One of our own ways to write reports."""

    dtype: str = "float32"
    beams: int = 1
    studies: int = 1
    batch: int = 1  # how many of the studies are decoded together
    has_expert: bool = False


# what is measured: the mode, the one beside it, and the name of that
MODES = {
    "greedy, int8": (Mode("int8"), Mode(), "float32"),
    "beams, int8": (Mode("int8", beams=10), Mode(beams=10), "float32"),
    "greedy, int4": (Mode("int4"), Mode(), "float32"),
    "beams, int4": (Mode("int4", beams=10), Mode(beams=10), "float32"),
    "greedy, bfloat16": (Mode("bfloat16"), Mode(), "float32"),
    "beams, bfloat16": (Mode("bfloat16", beams=10), Mode(beams=10), "float32"),
    "greedy, expert": (Mode(has_expert=True), Mode(), "no expert"),
    "beams, 16 studies": (Mode(beams=10, studies=16, batch=16), Mode(beams=10, studies=16), "one by one"),
}
EXPERT = {"Cardiomegaly": 0.9, "Edema": 0.7, "Pneumothorax": 0.1}


class Ours:
    def __init__(self, libra: Libra, work: str):
        libra.eos_token_ids = []  # every report has NEW tokens
        self.libra = libra
        self.learning = libra.decoder if work == "lora" else libra.connector

    def prefill(self, embeddings):
        """embeddings [T, hidden] -> logits [V] of the next token."""
        cache = Cache(self.libra.decoder.config, 1, len(embeddings), self.libra.device, self.libra.dtype)
        return self.libra.prefill(cache, 0, embeddings)

    def report(self, beams: int) -> list[int]:
        options = dict(num_beams=beams, max_new_tokens=NEW, no_repeat_ngram=0)
        return generate(self.libra, study(0), **options)[0].token_ids

    def loss(self, batch: Batch):
        return self.libra.loss(batch) / (batch.labels != IGNORED).sum()


class Peer:
    """Dinov2Model and LlamaForCausalLM in the places of a Libra's encoder and decoder: no peer has our connector."""

    def __init__(self, libra: Libra, work: str):
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        warnings.simplefilter("ignore")  # deprecated names within the peers

        # 1) the same weights in the peer's classes; our own give their memory back first
        dtype, device = libra.dtype, libra.device
        libra.encoder = libra.decoder = None
        self.encoder = transformers.Dinov2Model.from_pretrained(libra.encoder_files.source.folder, dtype=dtype)
        self.decoder = transformers.LlamaForCausalLM.from_pretrained(libra.weights.folder, dtype=dtype)
        for model in (self.encoder, self.decoder):
            model.to(device).requires_grad_(False)
        self.decoder.generation_config.eos_token_id = None

        # 2) what a Libra reads of its parts
        self.encoder.patch_embed = self.encoder.embeddings.patch_embeddings.projection
        libra.encoder, libra.encode, libra.decoder = self.encoder, self.encode, self.decoder.model
        self.libra, self.learning = libra, libra.connector
        if work == "lora":
            import peft

            # alpha and dropout as published
            config = peft.LoraConfig(r=costs.RANK, lora_alpha=2 * costs.RANK, lora_dropout=TrainConfig().lora_dropout)
            config.target_modules = list(PROJECTIONS)
            self.learning = peft.get_peft_model(self.decoder, config)

    def encode(self, pixels):
        """pixels [B, 3, S, S] -> features [B, L, N, C] without the class token."""
        hidden = self.encoder(pixels, output_hidden_states=True).hidden_states[1:]
        return torch.stack([layer[:, 1:] for layer in hidden], 1)

    def prefill(self, embeddings):
        output = self.decoder(inputs_embeds=embeddings[None], use_cache=True, logits_to_keep=1)
        return output.logits[0, 0, : self.libra.vocabulary]

    def report(self, beams: int) -> list[int]:
        embeddings = embed_prompt(self.libra)[None]  # [1, T, hidden]
        mask = torch.ones(embeddings.shape[:2], dtype=torch.long, device=embeddings.device)
        options = dict(num_beams=beams, do_sample=False, max_new_tokens=NEW, pad_token_id=0)
        return self.decoder.generate(inputs_embeds=embeddings, attention_mask=mask, **options)[0].tolist()

    def loss(self, batch: Batch):
        ids, labels = batch.ids.to(self.decoder.device), batch.labels.to(self.decoder.device)
        embeddings = self.libra.decoder.embed_tokens(ids.clamp(0))
        images = self.libra.embed_batch(batch.pixels).to(embeddings.dtype)
        embeddings = embeddings.masked_scatter((ids == IMAGE)[..., None], images)
        return self.decoder(inputs_embeds=embeddings, labels=labels, use_cache=False).loss


def pair_of(work: str, model: str, device: str) -> list:
    """Two functions that take nothing and prepare the two sides, ours first."""
    if work in MODES:
        return [partial(prepare_mode, mode, model, device) for mode in MODES[work][:2]]
    return [partial(prepare, side, work, model, device) for side in (Ours, Peer)]


def prepare_mode(mode: Mode, model: str, device: str):
    """As `prepare`, for prefills and reports in one mode. Results are compared by their number alone."""
    libra = Libra.from_pretrained(model, device=device, dtype=mode.dtype)
    libra.eos_token_ids = []  # every report has NEW tokens
    images = libra.embed_images(libra.preprocess(study(0).images()))
    # no mode changes the encoder
    libra.preprocess = lambda images: None
    libra.embed_images = lambda pixels: images
    studies = [replace(study(0), id=str(number)) for number in range(mode.studies)]
    options = dict(num_beams=mode.beams, max_new_tokens=NEW, no_repeat_ngram=0)

    def write() -> list[int]:
        lengths = []
        for start in range(0, mode.studies, mode.batch):
            batch = studies[start : start + mode.batch]
            expert = [EXPERT] * len(batch) if mode.has_expert else None
            lengths += [len(outputs[0].token_ids) for outputs in generate(libra, batch, expert=expert, **options)]
        return lengths

    return write


def load(dtype: str, model: str) -> tuple[Libra, int]:
    """Loads a model on the CPU; returns it and the bytes of its weights."""
    libra = Libra.from_pretrained(model, device="cpu", dtype=dtype)
    return libra, sum(parameter.nbytes for parameter in libra.parameters())


def prepare(side: type[Ours] | type[Peer], work: str, model: str, device: str):
    """Returns a function that does the work once, and returns a list of numbers to compare."""
    if work in TRAINING:
        # our rows share a prefix, the peer's rows ask one question each
        libra = build(TrainConfig(model=model, device=device, train=("lora" if work == "lora" else "connector",)))
        batch = training_batch(libra, work, shared=side is Ours)
        model = side(libra, work)
        return training_step(model.learning, lambda: model.loss(batch))

    libra = Libra.from_pretrained(model, device=device)
    pixels, embeddings = libra.preprocess(study(0).images()), embed_prompt(libra)
    model = side(libra, work)
    if work == "encoder":
        return lambda: libra.features(pixels).flatten()[::1000].tolist()
    if work == "prefill":
        return lambda: model.prefill(embeddings).tolist()
    return lambda: model.report(BEAMS[work])


def study(number: int) -> Study:
    """Two images of noise."""
    noise = np.random.RandomState(number).randint(0, 256, (2, 1200, 1000, 3), dtype=np.uint8)
    return Study(*map(Image.fromarray, noise))


def embed_prompt(libra: Libra) -> torch.Tensor:
    """-> embeddings [T, hidden] of the published question about study 0."""
    images = libra.embed_images(libra.preprocess(study(0).images()))
    return libra.splice(prompt_of(libra, study(0).query).ids, images)


def training_batch(libra: Libra, work: str, shared: bool) -> Batch:
    """Random ids. The questions about a pair of images are in one shared row, or in rows of their own."""
    pairs, questions = TRAINING[work]
    random = np.random.RandomState(0)
    draw = lambda *shape: random.randint(3, libra.vocabulary, shape).tolist()
    prefix, batch = [*draw(costs.PREFIX), IMAGE], []
    for pair in range(pairs):
        rows = []
        for text in draw(questions, costs.QUESTION + costs.ANSWER):
            ids = prefix + text
            labels = [IGNORED] * (len(ids) - costs.ANSWER) + ids[-costs.ANSWER :]
            rows.append(Row(ids, labels, segments=[0] * len(ids)))
        if shared:
            rows = [share_prefix(rows)]
        pixels = libra.preprocess(study(pair).images())
        batch += [row._replace(pixels=pixels) for row in rows]
    return collate(batch, libra.image_positions)


def training_step(learning: nn.Module, loss_of):
    """Returns a step that trains a module. Its result is always loss and gradient norm of a first step."""
    weights = [parameter for parameter in learning.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=TrainConfig().lr, weight_decay=0.0)

    @torch.enable_grad()
    def step():
        with torch.autocast("cuda", torch.bfloat16, enabled=weights[0].is_cuda):
            loss = loss_of()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return [loss.item(), norm.item()]

    # the sides draw random numbers in different orders: the first step has no dropout, and a common lora_A
    generator = torch.Generator().manual_seed(0)
    for name, parameter in learning.named_parameters():
        if "lora_A" in name:
            parameter.data.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    learning.eval()
    first = step()
    learning.train()
    return lambda: step() and first
