"""Reports from a Libra checkpoint: greedy, sampling, beam search and chat over one shared prefix.

    python sample.py --images current.jpg prior.jpg

A study's images and prompt are computed once (`prefill`). Every beam and sample continues that one prefix:
its keys and values are stored once, and each continuation has a short suffix of its own (`decoder.Cache`).
"""

if __name__ == "__main__":
    import plumbing.start  # noqa: F401 (first of all)


import argparse
import functools
import hashlib
import json
import logging
import math
import re
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Annotated, Literal

import torch

from contrast import IMAGE_ID, NGRAM, Contrast, guided_query, read_scores
from data import FINDINGS_PROMPT, Study
from decoder import Cache
from model import Libra
from plumbing.cli import Parser, add_decoding_flags, add_expert_flags, add_model_flags, fail, guard, progress
from plumbing.fields import CountOrZero, Range, Size, check_fields
from plumbing.image import load_image
from tokenizer import IMAGE, IMAGE_TEXT, Prompt, find_template, render

DEFAULT_MODEL = "X-iZhang/libra-v1.0-7b"
never = lambda: False  # should_stop of whoever does not stop


@dataclass(frozen=True)
class Output:
    """A report. token_ids end with eos if it was generated; score is the beam score, None without beams."""

    text: str
    token_ids: list[int]
    score: float | None = None


@dataclass
class Answer:
    """What a question gives: the reports, best first, the prompt that they continue, and the seconds of each stage."""

    outputs: list[Output]
    prompt: Prompt
    seconds: dict[str, float]

    def as_json(self) -> dict:
        """What `--json` prints."""
        outputs = [asdict(output) for output in self.outputs]
        seconds = {name: round(value, 3) for name, value in self.seconds.items()}
        return {"prompt": self.prompt.text, "input_ids": self.prompt.ids, "outputs": outputs, "seconds": seconds}


@dataclass(frozen=True)
class Options:
    """How to decode; `generate` explains the fields. ValueError where values are out of range or exclude each other."""

    max_new_tokens: Size = 512
    temperature: Annotated[float, Range(0, 100)] = 0.0
    top_p: Annotated[float, Range(1e-6, 1)] = 1.0
    top_k: CountOrZero = 50
    num_beams: Annotated[int, Range(1, 1000)] = 1
    length_penalty: Annotated[float, Range(-50, 50)] = 1.0
    no_repeat_ngram: Literal["auto"] | CountOrZero = "auto"
    num_return_sequences: Annotated[int, Range(1, 1000)] = 1
    seed: Annotated[int, Range(-(2**63), 2**63)] = 0

    def __post_init__(self):
        check_fields(asdict(self), Options, "decoding options")
        sequences, samples, has_beams = self.num_return_sequences, self.temperature > 0, self.num_beams > 1
        rules = [
            # logits divided by less would be infinite
            (not 0 < self.temperature < 1e-3, f"temperature {self.temperature} is neither 0 nor at least 0.001"),
            # what goes together
            (not (has_beams and samples), "beam search and sampling exclude each other: give num_beams or temperature"),
            (not has_beams or sequences <= self.num_beams, f"num_return_sequences {sequences} is more than num_beams"),
            (samples or has_beams or sequences == 1, "num_return_sequences needs beams or sampling: greedy gives one"),
        ]
        for holds, message in rules:
            if not holds:
                raise ValueError(message)

    @property
    def ngram(self) -> int:
        """Length of the n-grams that may not repeat; 0: all may."""
        if self.no_repeat_ngram != "auto":
            return self.no_repeat_ngram
        return 3 if self.num_beams > 1 else 0

    def for_contrast(self) -> "Options":
        """The options with contrastive decoding's own default. ValueError for beams, which it does not have."""
        if self.num_beams > 1:
            raise ValueError("an expert guides greedy decoding and sampling, not beams: leave out num_beams or expert")
        if self.no_repeat_ngram != "auto":
            return self
        return replace(self, no_repeat_ngram=NGRAM)


@dataclass
class Prefix:
    """Prefilled studies: their prompts, the cache that holds them, and the logits [B, V] of each first token.

    With contrast every study has two prompts, plain and guided: logits [2 * B, V] take turns, as the cache's rows do.
    """

    studies: list[Study]
    prompts: list[Prompt]  # the plain ones
    cache: Cache
    logits: torch.Tensor
    stop: str  # generation also ends at this string
    contrast: Contrast | None = None

    def repeats(self, n: int) -> "Repeats":
        """Bans n-grams in the rows that the cache has now."""
        # in contrastive decoding the image's id can be banned, as published
        image = IMAGE_ID if self.contrast else IMAGE
        prompts = []
        for b in self.cache.studies:
            prompts.append([image if id == IMAGE else id for id in self.prompts[b].ids])
        return Repeats(prompts, n, self.logits.device)


def generate(
    libra: Libra,
    studies: Study | list[Study],
    *,
    template: str | None = None,
    on_text: Callable[[str], None] | None = None,
    should_stop: Callable[[], bool] = never,
    expert: dict[str, float] | list[dict[str, float]] | None = None,
    alpha: float | None = None,
    beta: float | None = None,
    gamma: float | None = None,
    **options,
) -> list[Output] | list[list[Output]]:
    """Writes reports. One study gives a list of outputs, best first; a list of studies gives a list of such lists.

    Studies in a list decode as one batch, and each gives what it gives alone (sampling: if it has the same id; without
    one, its place in the list counts). Options, with their defaults:
    max_new_tokens=512; temperature=0 is greedy, above 0 it samples, with top_k=50, top_p=1 and seed=0;
    num_beams=1, length_penalty=1: a beam's score is divided by its length^length_penalty;
    no_repeat_ngram="auto": no n tokens in a row occur twice; 3 with beams, else off; 0 is off;
    num_return_sequences=1: how many beams or samples to return.

    template: name of a conversation template, instead of the checkpoint's. on_text(text) gets new text of a single
    study's first sequence while it is generated; with beams, at the end. should_stop() is asked at every token; if it
    returns True, what has been generated is returned. ValueError where options, images or a prompt's length are wrong.

    expert={"Cardiomegaly": 0.83, …}, for a list of studies a list of these: contrastive decoding (contrast.py), with
    alpha=0.5, beta=0.5 and gamma=10; no_repeat_ngram="auto" is 3 then, and beams are refused.
    """
    options = Options(**options)
    is_single = isinstance(studies, Study)
    if on_text and not is_single:
        raise ValueError("on_text follows one study: give a study, not a list")
    if is_single:
        studies, expert = [studies], None if expert is None else [expert]
    contrast = make_contrast(expert, alpha=alpha, beta=beta, gamma=gamma)
    if not studies:
        return []
    prefix = prefill(libra, studies, template, options, contrast=contrast)
    outputs = decode(libra, prefix, options, on_text, should_stop)
    return outputs[0] if is_single else outputs


def make_contrast(scores: list[dict] | None, **weights: float | None) -> Contrast | None:
    """Experts' scores of each study, and weights; None keeps a default. ValueError for weights without scores."""
    weights = {name: value for name, value in weights.items() if value is not None}
    if scores is not None:
        return Contrast(scores, **weights)
    if weights:
        raise ValueError(f"{' and '.join(weights)} given without expert: they weigh an expert's scores")
    return None


def counterfactuals(study: Study) -> dict[str, Study]:
    """The same question in other circumstances: what a report says differently there, the prior has done.

    {"as given": the study, "without the prior": …, "images exchanged": …}; without a prior only the study as given.
    """
    studies = {"as given": study}
    if study.prior is not None:
        studies["without the prior"] = replace(study, prior=None)
        studies["images exchanged"] = replace(study, current=study.prior, prior=study.current)
    return studies


@torch.inference_mode()
def prefill(
    libra: Libra,
    studies: list[Study],
    template: str | None = None,
    options: Options = Options(),
    pixels: list[torch.Tensor] | None = None,
    contrast: Contrast | None = None,
) -> Prefix:
    """Computes encoder, connector and prompt of each study, once for everything that is decoded from them.

    pixels: those of each study, as `Libra.preprocess` makes them, if they are already there.
    contrast: an expert's scores of each study, for contrastive decoding.
    """
    # 1) render the prompts, and refuse those that are too long before anything is computed
    queries = [study.query for study in studies]
    if contrast:
        options = options.for_contrast()
        if len(contrast.scores) != len(studies):
            raise ValueError(f"expert has scores for {len(contrast.scores)} studies, not for {len(studies)}")
        guided = map(guided_query, queries, contrast.scores)
        queries = [query for pair in zip(queries, guided, strict=True) for query in pair]
    prompts = [prompt_of(libra, query, template) for query in queries]
    lengths = [check_length(libra, prompt, options) for prompt in prompts]

    # 2) one study after the other: images -> image embeddings -> keys and values
    capacity, per_study = max(lengths, default=0), 2 if contrast else 1
    cache = Cache(libra.decoder.config, len(studies), capacity, libra.device, libra.dtype, per_study)
    logits = torch.empty(len(prompts), libra.vocabulary, device=libra.device)
    for b, study in enumerate(studies):
        its_pixels = pixels[b] if pixels else libra.preprocess(study.images(libra.pixels.dicom_display))
        image_embeddings = libra.embed_images(its_pixels)  # [N, hidden]
        row = b * per_study
        embeddings = libra.splice(prompts[row].ids, image_embeddings)  # [T, hidden]
        logits[row] = libra.prefill(cache, row, embeddings)
        # 3) the guided prompt takes over what it shares with the plain one: system prompt, images and question
        if contrast:
            guided = row + 1
            start = shared_positions(libra, prompts[row].ids, lengths[row], prompts[guided].ids, lengths[guided])
            cache.copy(row, guided, start)
            embeddings = libra.splice(prompts[guided].ids, image_embeddings)
            logits[guided] = libra.prefill(cache, guided, embeddings[start:])
    return Prefix(studies, prompts[::per_study], cache, logits, stop_string(template or libra.template), contrast)


def shared_positions(libra: Libra, old_ids: list[int], old_length: int, ids: list[int], length: int) -> int:
    """How many positions of a cached prompt a new one can keep: those where the ids agree, but never all.

    The last id is computed in any case: its logits are needed. Lengths are in positions, ids hold the image as one id.
    """
    same = 0
    limit = min(len(old_ids), len(ids) - 1)
    while same < limit and old_ids[same] == ids[same]:
        same += 1
    # a row that becomes long for longrope needs other frequencies from its beginning
    switch = libra.decoder.config.rope_switch
    if switch and old_length <= switch < length:
        return 0
    if IMAGE in ids[:same]:
        return same + libra.image_positions - 1  # one id, N positions
    return same


def prompt_of(libra: Libra, query: str, template: str | None = None) -> Prompt:
    """Renders a question about a study's images, open for the answer."""
    template = find_template(template or libra.template)
    return render([(f"{IMAGE_TEXT}\n{query}", None)], template, libra.tokenizer, libra.image_text)


def ask(
    libra: Libra,
    study: Study,
    options: Options,
    template: str | None = None,
    contrast: Contrast | None = None,
    on_text: Callable[[str], None] | None = None,
) -> Answer:
    """Answers a single question."""
    begin = time.monotonic()
    prefix = prefill(libra, [study], template, options, contrast=contrast)
    prefilled = time.monotonic()
    outputs = decode(libra, prefix, options, on_text)[0]
    seconds = {"prefill": prefilled - begin, "decode": time.monotonic() - prefilled}
    return Answer(outputs, prefix.prompts[0], seconds)


def stop_string(template: str) -> str:
    """The string that ends an answer in a conversation template."""
    template = find_template(template)
    return template.stop or template.end.strip()


def check_length(libra: Libra, prompt: Prompt, options: Options) -> int:
    """Returns the positions of a prompt with its image. ValueError where the model has fewer.

    Warns where a report could run past the model's positions.
    """
    config = libra.decoder.config
    limit = config.max_position_embeddings
    length = len(prompt.ids) - 1 + libra.image_positions  # the image is one id
    if length > limit:
        more = f"{length - limit} tokens more than the model's {limit}"
        raise ValueError(f"the prompt needs {length} positions, {more}: shorten the query")
    # beyond this length longrope uses other frequencies than the cached prefix has
    if config.rope_switch and length <= config.rope_switch:
        limit = config.rope_switch
    if length + options.max_new_tokens > limit:
        longest = f"a report of {options.max_new_tokens:,} tokens, the most that may be written,"
        warnings.warn(f"{longest} would run past the model's {limit} positions", stacklevel=2)
    return length


@torch.inference_mode()
def decode(
    libra: Libra,
    prefix: Prefix,
    options: Options,
    on_text: Callable[[str], None] | None = None,
    should_stop: Callable[[], bool] = never,
) -> list[list[Output]]:
    """Continues every study of a prefix. The prefix stays as it is, and can be continued again."""
    if prefix.contrast:
        options = options.for_contrast()
    stream = Stream(libra, prefix.stop, on_text) if on_text else None
    if options.num_beams > 1:
        sequences = beam_search(libra, prefix, options, should_stop)
    else:
        sequences = greedy_or_sample(libra, prefix, options, stream, should_stop)

    outputs = []
    for row in sequences:
        outputs.append([])
        for ids, score in row:
            # the stop string is not part of the report
            text = libra.tokenizer.decode(ids).strip()
            text = text.removesuffix(prefix.stop).strip()
            outputs[-1].append(Output(text, ids, score))
    if stream:
        stream.show(outputs[0][0].text)
    return outputs


class Stopped(Exception):
    """A computation was stopped before it had a result."""


@contextmanager
def stoppable(should_stop: Callable[[], bool]):
    """Makes long computations, such as a prefill, end with Stopped before the next layer once should_stop() is true."""

    def check(module, inputs):
        if should_stop():
            raise Stopped

    hook = torch.nn.modules.module.register_module_forward_pre_hook(check)
    try:
        yield
    finally:
        hook.remove()


# ------------------------------------------------------------------------------------------ greedy and sampling


@dataclass
class Sequence:
    """One continuation of one study, with random numbers of its own."""

    random: torch.Generator
    ids: list[int] = field(default_factory=list)
    is_done: bool = False


def greedy_or_sample(libra: Libra, prefix: Prefix, options: Options, stream, should_stop) -> list[list[tuple]]:
    """Greedy decoding (temperature 0) or K independent samples of each study; returns (ids, None) for each, [B][K]."""
    K = options.num_return_sequences
    rows: list[list[Sequence]] = []
    for b, study in enumerate(prefix.studies):
        name = b if study.id is None else study.id
        generators = [seeded_generator(options.seed, name, k) for k in range(K)]
        rows.append([Sequence(generator) for generator in generators])
    stops = Stops(libra, prefix.stop)
    cache, contrast, mix = prefix.cache, prefix.contrast, None
    cache.start(K)
    # a prefix that was continued before may have its studies in another order
    studies = cache.studies
    repeats = prefix.repeats(options.ngram)
    logits = prefix.logits.view(-1, cache.prompts, libra.vocabulary)[studies].flatten(0, 1)
    logits = logits[:, None].repeat(1, K, 1)  # [B, K, V]; with contrast [2 * B, K, V]
    if contrast:
        biases = contrast.biases(libra.tokenizer, libra.vocabulary, libra.device)[:, None]  # [B, 1, V]

    for step in range(options.max_new_tokens):
        # 1) choose the next token of every sequence of the studies that have not ended
        if contrast:
            logits = contrast.soft(logits)  # [B, K, V]
            mix = functools.partial(contrast.mix, logits + biases[studies])
        repeats.ban(logits)
        if options.temperature == 0:
            logits = mix(logits) if mix else logits
            chosen = logits.argmax(-1)  # [B, K]
        else:
            draws = []
            for b in studies:
                draws += [torch.rand((), generator=sequence.random).item() for sequence in rows[b]]
            draws = torch.tensor(draws, device=logits.device).view(-1, K)
            chosen = sample_tokens(logits, draws, options, mix)
        tokens = dict(zip(studies, chosen.tolist(), strict=True))  # {study: its K tokens}

        # 2) append it. Finished sequences stay beside those of their study; their tokens are not used
        ended = []
        for b, new_tokens in tokens.items():
            for sequence, token in zip(rows[b], new_tokens, strict=True):
                if not sequence.is_done:
                    sequence.ids.append(token)
                    sequence.is_done = token in libra.eos_token_ids or stops(sequence.ids)
            if all(sequence.is_done for sequence in rows[b]):
                ended.append(b)
        if stream:
            stream(rows[0][0].ids)

        # 3) stop if all sequences have ended; a study that has leaves the batch
        if len(ended) == len(studies) or step + 1 == options.max_new_tokens or should_stop():
            break
        rows_left = cache.leave(ended)
        studies = cache.studies
        repeats.append(rows_left, [tokens[b] for b in studies])

        # 4) compute the next logits; the plain and the guided prompt have the same continuation
        inputs = [tokens[b] for b in studies for _ in range(cache.prompts)]
        logits = libra.decode_step(cache, inputs)

    return [[(sequence.ids, None) for sequence in row] for row in rows]


def seeded_generator(seed: int, study, sequence: int) -> torch.Generator:
    """Random numbers for one sequence of one study, by its id. Neither batching nor sharding changes them."""
    digest = hashlib.sha256(f"{seed}/{study}/{sequence}".encode()).digest()
    number = int.from_bytes(digest[:8], "little", signed=True)
    return torch.Generator().manual_seed(number)


def sample_tokens(logits, draws, options: Options, mix: Callable | None = None):
    """logits [..., V] and one uniform number in [0, 1) per row [...] -> ids [...].

    Keeps the top_k likeliest tokens, then the fewest of those that reach top_p together. mix(logits of the top_k, their
    ids) gives the logits to draw from (`Contrast.mix`), if it is given.
    """
    # top-k, likeliest first
    V = logits.shape[-1]
    k = min(options.top_k or V, V)
    values, ids = (logits / options.temperature).topk(k)
    probabilities = values.softmax(-1)

    # top-p: drop a token if those before it already reach top_p
    before = probabilities.cumsum(-1) - probabilities
    if mix:
        probabilities = mix(values, ids).softmax(-1)
    probabilities = probabilities.masked_fill(before >= options.top_p, 0)

    # the first token at which the cumulative probability exceeds the draw
    cumulative = probabilities.cumsum(-1)
    total = cumulative[..., -1:]
    index = (cumulative <= draws[..., None] * total).sum(-1, keepdim=True)
    return ids.gather(-1, index)[..., 0]


# ------------------------------------------------------------------------------------------ beam search


@dataclass(frozen=True)
class Beam:
    score: float  # sum of log-probabilities; of a finished beam, divided by length^length_penalty
    ids: list[int]
    parent: int = 0  # number of the running beam that it extends


def beam_search(libra: Libra, prefix: Prefix, options: Options, should_stop) -> list[list[tuple]]:
    """Beam search as in `transformers` 4.51 (`_beam_search` of generation/utils.py), all studies as one batch.

    K beams of a study run side by side. A beam that generates eos is finished; the K best finished ones are kept. A
    study ends when it has K of them and the best running beam, scored at its present length, does not beat the worst.
    Returns (ids, score), best first, [B][R].
    """
    K = options.num_beams
    # enough candidates that K beams continue even if every eos id is among them
    num_candidates = max(2, 1 + len(libra.eos_token_ids)) * K
    if num_candidates > libra.vocabulary:
        raise ValueError(f"num_beams {K} is too many for a vocabulary of {libra.vocabulary}")
    stops = Stops(libra, prefix.stop)
    searches = [StudySearch(K, options.length_penalty, libra.eos_token_ids, stops) for _ in prefix.studies]
    cache = prefix.cache
    cache.start(K)
    studies = cache.studies
    repeats = prefix.repeats(options.ngram)
    logits = prefix.logits[studies][:, None]  # [B, 1, V]: at first each study has one beam, the empty one

    for length in range(1, options.max_new_tokens + 1):
        is_last = length == options.max_new_tokens or should_stop()

        # 1) score every continuation of every running beam, in the studies that have not ended
        scores = logits.log_softmax(-1)  # [B, K, V]
        repeats.ban(scores)
        sums = []
        for b in studies:
            sums.append([beam.score for beam in searches[b].running])
        scores += torch.tensor(sums, device=scores.device)[..., None]  # [B, K, 1]

        # 2) each study sorts its best candidates into beams that are finished and beams that continue
        best = scores.flatten(1).topk(num_candidates)  # [B, candidates], best first; index = k · V + token
        values, indices = best.values.tolist(), best.indices.tolist()
        for row, b in enumerate(studies):
            candidates = []
            for value, index in zip(values[row], indices[row], strict=True):
                k, token = divmod(index, libra.vocabulary)
                ids = [*searches[b].running[k].ids, token]
                candidates.append(Beam(value, ids, parent=k))
            searches[b].advance(candidates, length, is_last)

        # 3) a study that has ended leaves the batch
        ended = [b for b in studies if searches[b].has_ended]
        if len(ended) == len(studies):
            break
        rows_left = cache.leave(ended)
        studies = cache.studies

        # 4) each suffix moves to the beams that extend it; then one decoding step computes all of them
        parents, tokens = [], []
        for b in studies:
            parents.append([beam.parent for beam in searches[b].running])
            tokens.append([beam.ids[-1] for beam in searches[b].running])
        repeats.append(rows_left, tokens, parents)
        cache.reorder(parents)
        logits = libra.decode_step(cache, tokens)

    sequences = []
    for search in searches:
        best = search.finished[: options.num_return_sequences]
        sequences.append([(beam.ids, beam.score) for beam in best])
    return sequences


class StudySearch:
    """The beams of one study: those that run, and the K best finished ones."""

    def __init__(self, num_beams: int, length_penalty: float, eos_token_ids: list[int], stops: "Stops"):
        self.num_beams, self.length_penalty = num_beams, length_penalty
        self.eos_token_ids, self.stops = eos_token_ids, stops
        self.running = [Beam(0.0, [])]
        self.finished: list[Beam] = []
        self.has_ended = False

    def advance(self, candidates: list[Beam], length: int, is_last: bool):
        """Takes one step: candidates, best first, are all of this length; is_last cuts them off here."""
        K = self.num_beams
        # published: the stop string ends a search only when every candidate has it
        everything_ends = is_last or all(self.stops(beam.ids) for beam in candidates)

        # sort candidates. Only the K best may finish
        continuing = []
        for rank, beam in enumerate(candidates):
            if everything_ends or beam.ids[-1] in self.eos_token_ids:
                if rank < K:
                    self.finished.append(Beam(beam.score / length**self.length_penalty, beam.ids))
            elif len(continuing) < K:
                continuing.append(beam)
        self.finished.sort(key=lambda beam: -beam.score)
        self.finished = self.finished[:K]

        # end when even the best running beam is no better than the worst finished one
        can_improve = len(self.finished) < K
        if continuing and not can_improve:
            can_improve = continuing[0].score / length**self.length_penalty > self.finished[-1].score
        if everything_ends or not can_improve:
            self.has_ended = True
        self.running = continuing


# ------------------------------------------------------------------------------------------ repeats and stops


class Repeats:
    """Bans tokens that would complete an n-gram for the second time.

    The prompt's ids count, too, with the image as one id; nothing is renormalised (`NoRepeatNGramLogitsProcessor` of
    `transformers`).
    """

    def __init__(self, prompts: list[list[int]], n: int, device):
        """prompts: ids of each study; n: length of the n-grams, 0: nothing is banned."""
        self.n = n
        # padding on the left brings the ends together; no n-gram that has some is equal to another
        longest = max(map(len, prompts), default=0)
        rows = [[-1] * (longest - len(ids)) + ids for ids in prompts]
        self.ids = torch.tensor(rows, device=device)[:, None]  # [B, 1, T]: all sequences of a study begin alike

    def append(self, rows: list[int], tokens: list[list[int]], parents: list[list[int]] | None = None):
        """Keeps these rows and appends tokens [B][K]. Sequence k of row b continues parents[b][k], by default k."""
        if not self.n:
            return
        tokens = torch.tensor(tokens, device=self.ids.device)  # [B, K]
        ids = self.ids[rows]
        if parents is None:
            ids = ids.expand(-1, tokens.shape[1], -1)  # [B, K, T]
        else:
            parents = torch.tensor(parents, device=ids.device)
            ids = ids.gather(1, parents[..., None].expand(-1, -1, ids.shape[-1]))
        self.ids = torch.cat((ids, tokens[..., None]), -1)

    def ban(self, scores):
        """Sets the scores [B, K, V] of banned tokens to -inf."""
        n, T, V = self.n, self.ids.shape[-1], scores.shape[-1]
        if n == 0 or n > T:
            return
        # with n = 3 and ids … 7 8 4 … 7 8, the token 4 is banned
        ngrams = self.ids.unfold(-1, n, 1)  # [B, K, T - n + 1, n]
        newest = self.ids[..., None, T - n + 1 :]  # [B, K, 1, n - 1]
        is_repeat = (ngrams[..., :-1] == newest).all(-1)
        last = ngrams[..., -1]
        # neither padding nor the image is a token
        is_repeat &= (last >= 0) & (last < V)
        limits = torch.where(is_repeat, -math.inf, math.inf).to(scores.dtype)
        places = last.clamp(0, V - 1)
        sizes = (-1, scores.shape[1], -1)
        scores.scatter_reduce_(-1, places.expand(sizes), limits.expand(sizes), "amin")


class Stops:
    """Whether generated ids end with a stop string: with its ids, or with text that contains it.

    The published rule: `KeywordsStoppingCriteria` of libra/mm_utils.py.
    """

    def __init__(self, libra: Libra, stop: str):
        self.tokenizer, self.stop = libra.tokenizer, stop
        self.ids = libra.tokenizer.encode(stop)
        if self.ids[:1] == [libra.tokenizer.bos_token_id]:
            self.ids = self.ids[1:]

    def __call__(self, ids: list[int]) -> bool:
        tail = ids[-len(self.ids) :]
        return tail == self.ids or self.stop in self.tokenizer.decode(tail)


class Stream:
    """Passes on the text of a growing list of ids, but never what a later token could change or remove."""

    def __init__(self, libra: Libra, stop: str, on_text: Callable[[str], None]):
        self.tokenizer, self.stop, self.on_text = libra.tokenizer, stop, on_text
        self.shown = 0  # characters

    def __call__(self, ids: list[int]):
        text = self.tokenizer.decode(ids).lstrip()
        # clean-up removes the space of " 've" when the token is complete
        if self.tokenizer.cleans_up:
            text = text[:-4]
        # the text may end with the beginning of the stop string
        for length in range(len(self.stop), 0, -1):
            text = text.removesuffix(self.stop[:length])
        # U+FFFD: a character whose bytes have not all come
        self.show(re.sub(r"[\s\ufffd]+$", "", text))

    def show(self, text: str):
        """Passes on what is new in a text. Call it with the final text at the end."""
        if len(text) > self.shown:
            self.on_text(text[self.shown :])
            self.shown = len(text)


# ------------------------------------------------------------------------------------------ chat


class Chat:
    """A conversation about one study.

    A turn gives what a fresh run of the whole conversation gives, as published. The cache is kept as far as the ids
    agree, so a turn computes only the previous answer and the new question.
    """

    def __init__(self, libra: Libra, study: Study, template: str | None = None):
        self.libra, self.study, self.template = libra, study, template or libra.template
        self.turns: list[tuple[str, str]] = []
        self.ids: list[int] = []  # those in the cache
        self.image_embeddings = self.cache = None

    def ask(
        self,
        question: str,
        on_text: Callable[[str], None] | None = None,
        should_stop: Callable[[], bool] = never,
        **options,
    ) -> Output:
        """Answers the next question; options as for `generate`. A question that fails leaves no trace."""
        return self.answer(question, Options(**options), on_text, should_stop).outputs[0]

    def answer(
        self,
        question: str,
        options: Options,
        on_text: Callable[[str], None] | None = None,
        should_stop: Callable[[], bool] = never,
    ) -> Answer:
        """Answers the next question with all sequences; the conversation continues from the first.

        should_stop() is asked at every layer before the first token: then Stopped is raised. Afterwards it is asked at
        every token, and what has been generated is the answer.
        """
        begin = time.monotonic()
        with stoppable(should_stop) if should_stop is not never else nullcontext():
            prefix, turn = self.prefill(question, options)
        prefilled = time.monotonic()
        outputs = decode(self.libra, prefix, options, on_text, should_stop)[0]
        self.turns.append((turn, outputs[0].text))
        seconds = {"prefill": prefilled - begin, "decode": time.monotonic() - prefilled}
        return Answer(outputs, prefix.prompts[0], seconds)

    @torch.inference_mode()
    def prefill(self, question: str, options: Options) -> tuple[Prefix, str]:
        """Computes the conversation up to the answer to a question. Returns it with the question as it was rendered."""
        libra = self.libra

        # 1) render the whole conversation; the first question has the image
        if not self.turns:
            question = f"{IMAGE_TEXT}\n{question}"
        turns = [*self.turns, (question, None)]
        prompt = render(turns, find_template(self.template), libra.tokenizer, libra.image_text)
        length = check_length(libra, prompt, options)
        if self.cache is None:
            images = self.study.images(libra.pixels.dicom_display)
            self.image_embeddings = libra.embed_images(libra.preprocess(images))  # [N, hidden]
            self.cache = Cache(libra.decoder.config, 1, length, libra.device, libra.dtype)

        # 2) keep the cache as far as the ids agree
        start = shared_positions(libra, self.ids, int(self.cache.lengths[0]), prompt.ids, length)
        self.cache.reserve(length)
        self.cache.rewind(start, row=0)

        # 3) prefill the rest. An interrupted prefill must not be taken for a cached one
        self.ids = []
        embeddings = libra.splice(prompt.ids, self.image_embeddings)  # [T, hidden]
        logits = libra.prefill(self.cache, 0, embeddings[start:])  # [V]
        self.ids = prompt.ids
        return Prefix([self.study], [prompt], self.cache, logits[None], stop_string(self.template)), question


# ------------------------------------------------------------------------------------------ command line


def parse(arguments=None):
    about = "Write the findings of a chest X-ray, read beside the patient's previous one."
    parser = Parser(prog="sample.py", description=about, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    help = "the current image, then the prior, if any: JPEG, PNG, TIFF, DICOM; a file or http(s) URL"
    add("--images", nargs="+", required=True, metavar="IMAGE", help=help)
    add("--model", default=DEFAULT_MODEL, metavar="ID_OR_DIR", help="checkpoint: a folder or a hub id")
    add_model_flags(add)
    add("--query", metavar="TEXT", help="the question, instead of the published prompt for findings")
    add_decoding_flags(add)
    add_expert_flags(add, "JSON {label: probability}")
    add("--num-return-sequences", type=int, default=1, metavar="R", help="reports: best beams, or samples")
    add("--chat", action="store_true", help="ask more questions about the same images; an empty line ends")
    add("--json", action="store_true", help="print one JSON object: prompt, ids, outputs, seconds")
    add("--verbose", action="store_true", help="say on stderr which kernels compute attention, int8 and int4 layers")
    arguments = parser.parse_args(arguments)
    if len(arguments.images) > 2:
        parser.error(f"--images takes one or two images (current, prior), not {len(arguments.images)}")
    if arguments.chat and arguments.json:
        parser.error("--chat and --json exclude each other")
    if arguments.chat and arguments.expert is not None:
        parser.error("--chat and --expert exclude each other: an expert guides a single answer")
    return arguments


def options_of(arguments) -> Options:
    """The decoding options of a command line. ValueError for these or an unknown template, before any long work."""
    if arguments.template:
        find_template(arguments.template)
    names = [field.name for field in fields(Options) if hasattr(arguments, field.name)]
    return Options(**{name: getattr(arguments, name) for name in names})


def contrast_of(scores: list[dict] | None, arguments) -> Contrast | None:
    """The contrast of a command line and of scores that it names."""
    return make_contrast(scores, alpha=arguments.alpha, beta=arguments.beta, gamma=arguments.gamma)


def load(arguments, model: str | None = None, show: Callable[[int, int], None] | None = None) -> Libra:
    """Reads the model of a command line, or another one with its flags. show(bytes done, bytes in all): progress."""
    flags = {name: getattr(arguments, name) for name in ("base", "encoder", "device", "dtype")}
    if arguments.dicom_display:
        flags["changes"] = {"mm_dicom_display": arguments.dicom_display}
    show = show or progress("loading", "GiB", 2**30)
    libra = Libra.from_pretrained(model or arguments.model, progress=show, **flags)
    if arguments.compile:
        libra.compile_step()
    return libra


def run(arguments):
    # 1) check everything that is quick to check
    if arguments.verbose:
        logging.basicConfig(format="sample.py: %(message)s")
        for name in ("attention", "plumbing.quantised"):
            logging.getLogger(name).setLevel(logging.INFO)
    options = options_of(arguments)
    scores = [read_scores(arguments.expert)] if arguments.expert is not None else None
    contrast = contrast_of(scores, arguments)
    if contrast:
        options.for_contrast()
    display = arguments.dicom_display or "standard"
    images = [load_image(image, display) for image in arguments.images]

    # 2) load
    begin = time.monotonic()
    try:
        libra = load(arguments)
    except OSError as error:
        if arguments.model != DEFAULT_MODEL:
            raise
        raise OSError(f"{error}; --model assets/phantom, a toy trained on drawings, needs no download") from None
    # only the model knows how DICOM was shown in its training
    if libra.pixels.dicom_display != display:
        images = [load_image(image, libra.pixels.dicom_display) for image in arguments.images]
    study = Study(*images, query=arguments.query or FINDINGS_PROMPT)
    loaded = time.monotonic()
    if arguments.chat:
        return converse(Chat(libra, study, arguments.template), arguments.query, asdict(options))

    # 3) prefill and decode
    streams = not arguments.json and options.num_return_sequences == 1
    answer = ask(libra, study, options, arguments.template, contrast, write if streams else None)

    # 4) print
    if arguments.json:
        answer.seconds = {"load": loaded - begin} | answer.seconds
        print(json.dumps(answer.as_json()))
    elif streams:
        print()
    else:
        for number, output in enumerate(answer.outputs, start=1):
            score = "" if output.score is None else f", score {output.score:.4f}"
            print(f"[{number}{score}] {output.text}")


write = functools.partial(print, end="", flush=True)


def converse(chat: Chat, question: str | None, options: dict):
    """Reads questions from stdin and writes answers to stdout, until an empty line or the end of the input."""
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            question = question or input(prompt)
        except EOFError:
            print()
            return
        if not question:
            return
        try:
            chat.ask(question, on_text=write, **options)
            print()
        except ValueError as error:  # such as a question that is too long: the next one may work
            fail("sample.py", error)
        question = None


def main(arguments) -> int:
    return guard("sample.py", run, arguments)


if __name__ == "__main__":
    sys.exit(main(parse()))
