"""Reports from a Libra checkpoint: greedy, sampling and beam search over one shared prefix; command line and chat.

A study's prompt and images are computed once (`prefill`); every beam and sample goes on from that one prefix.

    python sample.py --images current.jpg prior.jpg
"""

import argparse
import sys

from plumbing.cli import Parser, add_decoding_flags, add_model_flags, fail, guard, progress

DEFAULT_MODEL = "X-iZhang/libra-v1.0-7b"


def parse(arguments=None):
    parser = Parser(
        prog="sample.py",
        description="Write the findings of a chest X-ray, read beside the patient's previous one.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--images", nargs="+", required=True, metavar="IMAGE",
        help="the current image, then the prior, if any: JPEG, PNG, TIFF, DICOM; a file or http(s) URL")  # fmt: skip
    add("--model", default=DEFAULT_MODEL, metavar="ID_OR_DIR", help="checkpoint: a folder or a hub id")
    add_model_flags(add)
    add("--query", metavar="TEXT", help="the question; without it the published prompt for findings is asked")
    add_decoding_flags(add)
    add("--num-return-sequences", type=int, default=1, metavar="R", help="reports: best beams, or samples")
    add("--chat", action="store_true", help="go on asking about the same images; an empty line ends")
    add("--json", action="store_true", help="print one JSON object: prompt, ids, outputs, seconds")
    add("--verbose", action="store_true", help="say on stderr which kernels compute attention")
    arguments = parser.parse_args(arguments)
    if len(arguments.images) > 2:
        parser.error(f"--images takes one or two images (current, prior), not {len(arguments.images)}")
    if arguments.chat and arguments.json:
        parser.error("--chat and --json exclude each other")
    return arguments


if __name__ == "__main__":  # before torch is imported, so that --help and mistakes answer at once
    ARGUMENTS = parse()

# ruff: noqa: E402
import hashlib
import json
import logging
import re
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields

import torch

from data import Study
from decoder import Cache
from model import Libra
from plumbing.image import load_image
from tokenizer import IMAGE, Prompt, find_template, render


@dataclass(frozen=True)
class Output:
    """A report. token_ids end with eos where it came; score is the beam score, None without beams."""

    text: str
    token_ids: list[int]
    score: float | None = None


@dataclass(frozen=True)
class Options:
    """How to decode; see `generate`."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 50
    num_beams: int = 1
    length_penalty: float = 1.0
    no_repeat_ngram: int | str = "auto"
    num_return_sequences: int = 1
    seed: int = 0

    def __post_init__(self):
        problems = {
            f"max_new_tokens {self.max_new_tokens} is not at least 1": self.max_new_tokens < 1,
            f"temperature {self.temperature} is not a number from 0 on": not 0 <= self.temperature < float("inf"),
            f"top_p {self.top_p} is not above 0 and at most 1": not 0 < self.top_p <= 1,
            f"top_k {self.top_k} is negative (0 means all)": self.top_k < 0,
            f"num_beams {self.num_beams} is not at least 1": self.num_beams < 1,
            f"length_penalty {self.length_penalty} is not a number": not abs(self.length_penalty) < float("inf"),
            f"no_repeat_ngram {self.no_repeat_ngram!r} is neither 'auto' nor a number from 0 on":
                self.no_repeat_ngram != "auto" and not (isinstance(self.ngram, int) and self.ngram >= 0),
            f"num_return_sequences {self.num_return_sequences} is not at least 1": self.num_return_sequences < 1,
            "beam search and sampling exclude each other: give num_beams or temperature":
                self.num_beams > 1 and self.temperature > 0,
            f"num_return_sequences {self.num_return_sequences} is more than num_beams {self.num_beams}":
                self.num_return_sequences > self.num_beams > 1,
            f"num_return_sequences {self.num_return_sequences} needs beams or a temperature above 0: greedy gives one":
                self.num_return_sequences > 1 == self.num_beams and self.temperature == 0,
        }  # fmt: skip
        if found := next((problem for problem, is_found in problems.items() if is_found), None):
            raise ValueError(found)

    @property
    def ngram(self) -> int:
        return (3 if self.num_beams > 1 else 0) if self.no_repeat_ngram == "auto" else self.no_repeat_ngram


@dataclass
class Prefix:
    """Studies, prefilled: their prompts, the cache that holds them, the logits [B, V] behind each."""

    studies: list[Study]
    prompts: list[Prompt]
    cache: Cache
    logits: torch.Tensor
    stop: str  # generation ends at this string too


def generate(
    libra: Libra,
    studies: Study | list[Study],
    *,
    template: str | None = None,
    on_text: Callable[[str], None] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    **options,
) -> list[Output] | list[list[Output]]:
    """Write reports: one study gives a list of outputs (best first), a list of studies a list of such lists.

    Studies in a list decode as one batch, and each gives what it gives alone. Options and defaults:
    max_new_tokens=512; temperature=0 (greedy), above it sampling with top_p=1, top_k=50, seed=0; num_beams=1,
    length_penalty=1; no_repeat_ngram="auto" (3 with beams, else off; 0 is off); num_return_sequences=1 (beams, or
    samples). template: name of a conversation template instead of the checkpoint's.
    on_text(text) gets the text of a single study's first sequence as it is made (beam search: at the end).
    should_stop() is asked at every token; when it says so, what there is comes back.
    ValueError for options out of range, unreadable images, a prompt longer than the model's positions.
    """
    options = Options(**options)
    single = isinstance(studies, Study)
    if on_text and not single:
        raise ValueError("on_text follows one study: give a study, not a list")
    prefix = prefill(libra, [studies] if single else studies, template, options)
    outputs = decode(libra, prefix, options, on_text, should_stop)
    return outputs[0] if single else outputs


@torch.inference_mode()
def prefill(
    libra: Libra,
    studies: list[Study],
    template: str | None = None,
    options: Options = Options(),
    pixels: list[torch.Tensor] | None = None,
) -> Prefix:
    """Encoder, connector and prompt of each study, once, whatever is to be decoded from them.

    pixels: of each study, as `Libra.preprocess` makes them, where that is done already.
    """
    prompts = [prompt_of(libra, study.query, template) for study in studies]
    lengths = [check_length(libra, prompt, options) for prompt in prompts]
    cache = Cache(libra.decoder.config, len(studies), max(lengths, default=0), libra.device, libra.dtype)
    logits = torch.empty(len(studies), libra.vocabulary, device=libra.device)
    for number, (study, prompt) in enumerate(zip(studies, prompts, strict=True)):
        image_embeddings = libra.embed_images(pixels[number] if pixels else libra.preprocess(study.images()))
        logits[number] = libra.prefill(cache, number, libra.splice(prompt.ids, image_embeddings))
    return Prefix(studies, prompts, cache, logits, stop_string(template or libra.template))


def prompt_of(libra: Libra, query: str, template: str | None = None) -> Prompt:
    """A question about a study's images, in a conversation template, open for the answer."""
    turns = [(f"{libra.image_text}\n{query}", None)]
    return render(turns, find_template(template or libra.template), libra.tokenizer)


def stop_string(template: str) -> str:
    found = find_template(template)
    return found.stop or found.end.strip()


def check_length(libra: Libra, prompt: Prompt, options: Options) -> int:
    """Positions of a prompt, its image expanded; ValueError where the model has fewer."""
    config = libra.decoder.config
    length, limit = len(prompt.ids) - 1 + libra.image_positions, config.max_position_embeddings
    if length > limit:
        raise ValueError(
            f"the prompt needs {length} positions, {length - limit} tokens more than the model's {limit}: "
            "shorten the query"
        )
    if config.rope_switch and length <= config.rope_switch:
        limit = config.rope_switch  # the frequencies for long rows would differ from those of the cached prefix
    if length + options.max_new_tokens > limit:
        warnings.warn(
            f"a report of over {limit - length} tokens would run past the model's {limit} positions", stacklevel=2
        )
    return length


@torch.inference_mode()
def decode(
    libra: Libra,
    prefix: Prefix,
    options: Options,
    on_text: Callable[[str], None] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[list[Output]]:
    """Continue every study of a prefix; the prefix stays as it is, to be continued again."""
    search = _beam_search if options.num_beams > 1 else _sample
    stream = _Stream(libra, prefix.stop, on_text) if on_text else None
    found = search(libra, prefix, options, stream, should_stop)  # [B][R] of (token ids, score)
    outputs = [
        [Output(_finish(libra.tokenizer.decode(ids), prefix.stop), ids, score) for ids, score in sequences]
        for sequences in found
    ]
    if stream:
        stream.close(outputs[0][0].text)
    return outputs


def _sample(libra, prefix, options, stream, should_stop):
    """Greedy decoding (temperature 0), or independent samples."""
    B, K = len(prefix.studies), options.num_return_sequences
    sequences = [[[] for _ in range(K)] for _ in range(B)]
    done = [[False] * K for _ in range(B)]
    names = [b if study.id is None else study.id for b, study in enumerate(prefix.studies)]
    generators = [[_generator(options.seed, name, k) for k in range(K)] for name in names]
    stops = Stops(libra, prefix.stop)
    logits = prefix.logits[:, None].repeat(1, K, 1)  # [B, K, V]
    prefix.cache.start(K)
    for step in range(options.max_new_tokens):
        _ban_repeats(logits, prefix, sequences, options.ngram)
        if options.temperature == 0:
            tokens = logits.argmax(-1).tolist()
        else:
            draws = torch.tensor([[torch.rand((), generator=g).item() for g in row] for row in generators])
            tokens = sample_tokens(logits, draws.to(logits.device), options).tolist()
        for b in range(B):
            for k in range(K):
                if not done[b][k]:
                    sequences[b][k].append(tokens[b][k])
                    done[b][k] = tokens[b][k] in libra.eos_token_ids or stops(sequences[b][k])
        if stream:
            stream(sequences[0][0])
        if step + 1 == options.max_new_tokens or all(map(all, done)) or should_stop():
            break
        logits = libra.decode_step(prefix.cache, tokens)
    return [[(ids, None) for ids in rows] for rows in sequences]


def _generator(seed: int, study, sequence: int) -> torch.Generator:
    """Random numbers of one sequence of one study: neither batching nor sharding changes them."""
    digest = hashlib.sha256(f"{seed}/{study}/{sequence}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def sample_tokens(logits, draws, options: Options):
    """logits [..., V], one uniform number in [0, 1) for each row [...] -> ids [...].

    Temperature, then the top_k likeliest, then the fewest of these that reach top_p together, renormalised.
    """
    values, ids = (logits / options.temperature).topk(min(options.top_k or logits.shape[-1], logits.shape[-1]))
    p = values.softmax(-1)
    p = p.masked_fill(p.cumsum(-1) - p >= options.top_p, 0)
    cumulative = p.cumsum(-1)
    chosen = (cumulative <= draws[..., None] * cumulative[..., -1:]).sum(-1, keepdim=True)
    return ids.gather(-1, chosen)[..., 0]


@dataclass(frozen=True)
class Beam:
    score: float  # sum of log-probabilities; of a finished beam, divided by length^length_penalty
    ids: list[int]


def _beam_search(libra, prefix, options, stream, should_stop):
    """Beam search as `transformers` 4.51 does it, each study by its own stopping test.

    Of each study K beams run; a step looks at enough candidates that K of them go on whatever ends. Only the K best
    candidates of a step may finish. A study ends when K beams have finished and no running one can beat the worst.
    """
    B, K = len(prefix.studies), options.num_beams
    candidates = max(2, 1 + len(libra.eos_token_ids)) * K
    if candidates > libra.vocabulary:
        raise ValueError(f"num_beams {K} is too many for a vocabulary of {libra.vocabulary}")
    running = [[Beam(0.0, [])] for _ in range(B)]
    finished: list[list[Beam]] = [[] for _ in range(B)]
    ended = [False] * B
    stops = Stops(libra, prefix.stop)
    logits = prefix.logits[:, None]  # [B, 1, V]: at first each study has one beam
    prefix.cache.start(K)
    for length in range(1, options.max_new_tokens + 1):
        last = length == options.max_new_tokens or should_stop()
        scores = logits.log_softmax(-1)
        _ban_repeats(scores, prefix, [[beam.ids for beam in beams] for beams in running], options.ngram)
        scores += torch.tensor([[beam.score for beam in beams] for beams in running], device=scores.device)[..., None]
        best = scores.flatten(1).topk(candidates)  # [B, candidates], best first
        choices = zip(best.values.tolist(), best.indices.tolist(), strict=True)
        parents = []
        for b, (values, places) in enumerate(choices):
            grown, going_on = [], []
            for value, place in zip(values, places, strict=True):
                origin, token = divmod(place, scores.shape[-1])
                grown.append((origin, Beam(value, [*running[b][origin].ids, token])))
            all_end = last or all(stops(beam.ids) for _, beam in grown)
            for rank, (origin, beam) in enumerate(grown):
                if all_end or beam.ids[-1] in libra.eos_token_ids:
                    if rank < K and not ended[b]:
                        finished[b].append(Beam(beam.score / length**options.length_penalty, beam.ids))
                elif len(going_on) < K:
                    going_on.append((origin, beam))
            finished[b] = sorted(finished[b], key=lambda beam: -beam.score)[:K]
            hopeless = len(finished[b]) == K and (
                not going_on or going_on[0][1].score / length**options.length_penalty <= finished[b][-1].score
            )
            ended[b] = ended[b] or all_end or hopeless
            # an ended study runs along with the others, unheeded
            going_on = going_on or grown[:K]
            running[b] = [beam for _, beam in going_on]
            parents.append([origin for origin, _ in going_on])
        if all(ended):
            break
        prefix.cache.reorder(parents)
        logits = libra.decode_step(prefix.cache, [[beam.ids[-1] for beam in beams] for beams in running])
    return [[(beam.ids, beam.score) for beam in beams[: options.num_return_sequences]] for beams in finished]


def _ban_repeats(scores, prefix, sequences, n: int):
    """Set to -inf, in scores [B, K, V], every token that would complete a run of n ids for the second time.

    The prompt's ids count, with the image as one id of its own (published behaviour); nothing is renormalised.
    """
    if not n:
        return
    for b, rows in enumerate(sequences):
        for k, generated in enumerate(rows):
            ids = prefix.prompts[b].ids + generated
            tail = ids[len(ids) - n + 1 :]
            followers = {ids[i + n - 1] for i in range(len(ids) - n + 1) if ids[i : i + n - 1] == tail}
            banned = [id for id in followers if 0 <= id < scores.shape[-1]]
            scores[b, k, banned] = float("-inf")


class Stops:
    """Whether generated ids end with a stop string: with its ids, or with text that contains it (published)."""

    def __init__(self, libra: Libra, stop: str):
        self.decode, self.stop = libra.tokenizer.decode, stop
        ids = libra.tokenizer.encode(stop)
        self.ids = ids[1:] if ids[:1] == [libra.tokenizer.bos_token_id] else ids

    def __call__(self, ids: list[int]) -> bool:
        tail = ids[-len(self.ids) :]
        return tail == self.ids or self.stop in self.decode(tail)


def _finish(text: str, stop: str) -> str:
    return text.strip().removesuffix(stop).strip()


class _Stream:
    """Hands out the text of a growing list of ids, never what a later token could change or take back."""

    def __init__(self, libra: Libra, stop: str, on_text: Callable[[str], None]):
        self.tokenizer, self.stop, self.on_text, self.shown = libra.tokenizer, stop, on_text, 0

    def __call__(self, ids: list[int]):
        text = self.tokenizer.decode(ids).lstrip()
        if self.tokenizer.cleans_up:
            text = text[:-4]  # " 've" loses its space when it is whole
        for length in range(len(self.stop), 0, -1):
            text = text.removesuffix(self.stop[:length])
        self._show(re.sub(r"[\s\ufffd]+$", "", text))  # U+FFFD: a character of which bytes may still come

    def _show(self, text: str):
        if len(text) > self.shown:
            self.on_text(text[self.shown :])
            self.shown = len(text)

    def close(self, text: str):
        self._show(text)


class Chat:
    """A conversation about one study. Later turns give what a fresh run of the whole conversation gives, at the cost
    of the new ids only: the cache is kept as far as the ids agree.
    """

    def __init__(self, libra: Libra, study: Study, template: str | None = None):
        self.libra, self.study, self.template = libra, study, template or libra.template
        self.turns: list[tuple[str, str]] = []
        self.ids: list[int] = []
        self.image_embeddings = self.cache = None

    @torch.inference_mode()
    def ask(
        self,
        question: str,
        on_text: Callable[[str], None] | None = None,
        should_stop: Callable[[], bool] = lambda: False,
        **options,
    ) -> Output:
        """The best answer to the next question; options as for `generate`. A question that fails leaves no trace."""
        libra, options = self.libra, Options(**options)
        question = question if self.turns else f"{libra.image_text}\n{question}"
        prompt = render([*self.turns, (question, None)], find_template(self.template), libra.tokenizer)
        length = check_length(libra, prompt, options)
        if self.cache is None:
            self.image_embeddings = libra.embed_images(libra.preprocess(self.study.images()))
            self.cache = Cache(libra.decoder.config, 1, length, libra.device, libra.dtype)
        embeddings = libra.splice(prompt.ids, self.image_embeddings)
        pairs = enumerate(zip(self.ids, prompt.ids, strict=False))
        same = next((i for i, (old, new) in pairs if old != new), min(len(self.ids), len(prompt.ids)))
        same = min(same, len(prompt.ids) - 1)  # the last id is computed anew: its logits are wanted
        kept = same + (len(self.image_embeddings) - 1) * (IMAGE in prompt.ids[:same])  # positions, not ids
        switch = libra.decoder.config.rope_switch
        if switch and self.cache.lengths[0] <= switch < length:  # the kept keys have the frequencies of short rows
            kept = 0
        self.cache.reserve(length)
        self.cache.rewind(kept, 0)
        self.ids = []  # until the prefill is through: an interrupted one must not be taken for a cached one
        logits = libra.prefill(self.cache, 0, embeddings[kept:])
        self.ids = prompt.ids
        prefix = Prefix([self.study], [prompt], self.cache, logits[None], stop_string(self.template))
        output = decode(libra, prefix, options, on_text, should_stop)[0][0]
        self.turns.append((question, output.text))
        return output


# ------------------------------------------------------------------------------------------ command line


def options_of(arguments) -> Options:
    """The options that a command line gave; ValueError, also for its template, before anything long begins."""
    if arguments.template:
        find_template(arguments.template)
    return Options(**{f.name: getattr(arguments, f.name) for f in fields(Options) if hasattr(arguments, f.name)})


def load(arguments) -> Libra:
    """The model that a command line names."""
    return Libra.from_pretrained(
        arguments.model,
        base=arguments.base,
        encoder=arguments.encoder,
        device=arguments.device,
        dtype=arguments.dtype,
        progress=progress(f"loading {arguments.model}", "GiB", 2**30),
    )


def run(arguments):
    warnings.showwarning = lambda message, *_, **__: print(f"sample.py: warning: {message}", file=sys.stderr)
    if arguments.verbose:
        logging.basicConfig(format="sample.py: %(message)s")
        logging.getLogger("attention").setLevel(logging.INFO)
    options = options_of(arguments)
    images = [load_image(image) for image in arguments.images]  # once: an address is fetched, a warning printed
    study = Study(*images, **({"query": arguments.query} if arguments.query else {}))
    begin = time.monotonic()
    try:
        libra = load(arguments)
    except OSError as error:
        if arguments.model != DEFAULT_MODEL:
            raise
        raise OSError(f"{error}; --model assets/phantom, a toy trained on drawings, needs no download") from None
    loaded = time.monotonic()
    if arguments.chat:
        return converse(Chat(libra, study, arguments.template), arguments.query, asdict(options))
    if sys.stderr.isatty():
        print(f"reading {' and '.join(arguments.images)} …", file=sys.stderr)
    prefix = prefill(libra, [study], arguments.template, options)
    filled = time.monotonic()
    on_text = None if arguments.json or options.num_return_sequences > 1 else write
    outputs = decode(libra, prefix, options, on_text)[0]
    seconds = {"load": loaded - begin, "prefill": filled - loaded, "decode": time.monotonic() - filled}
    if arguments.json:
        prompt = prefix.prompts[0]
        result = {"prompt": prompt.text, "input_ids": prompt.ids, "outputs": [asdict(output) for output in outputs]}
        print(json.dumps(result | {"seconds": {name: round(value, 3) for name, value in seconds.items()}}))
    elif on_text:
        print()
    else:
        for number, output in enumerate(outputs, 1):
            score = "" if output.score is None else f", score {output.score:.4f}"
            print(f"[{number}{score}] {output.text}")


def write(text: str):
    print(text, end="", flush=True)


def converse(chat: Chat, question: str | None, settings: dict):
    """Questions from stdin, answers to stdout; an empty line or the end of the input ends."""
    prompt = "> " if sys.stdin.isatty() else ""
    try:
        while question := question or input(prompt):
            try:
                chat.ask(question, on_text=write, **settings)
                print()
            except ValueError as error:  # a question too long: ask another
                fail("sample.py", error)
            question = None
    except EOFError:
        print()


def main(arguments) -> int:
    return guard("sample.py", run, arguments)


if __name__ == "__main__":
    sys.exit(main(ARGUMENTS))
