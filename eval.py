"""Answers to a question file; scores of them, which variant, how sure, with and without a prior; what the prior does.

    python eval.py answer --model ID_OR_DIR --questions questions.jsonl --image-folder images --answers answers.jsonl
    python eval.py score --references questions.jsonl --predictions answers.jsonl --html page.html
    python eval.py prior --model ID_OR_DIR --questions questions.jsonl --image-folder images --out priors
"""

import argparse
import sys

from cli import Parser, add_decoding_flags, add_model_flags, atomic, guard, progress

RESAMPLES = 1000  # of the bootstrap

METRICS = {  # the published keys, in the published order -> what stands behind each, × 100
    **{
        f"BLEU{n}": f"corpus BLEU, n-grams up to {n}, mteval-13a tokens, one reference, no smoothing; not a mean over "
        "reports, not COCO's tokens"
        for n in (1, 2, 3, 4)
    },
    "METEOR": "mean of NLTK's METEOR (exact, stem, WordNet 3.0; α 0.9, β 3, γ 0.5) on its word tokens; "
    "not METEOR 1.5 (Java), which weighs and paraphrases",
    "ROUGE-L": "mean F1 of the longest common subsequence of [a-z0-9]+ words, no stemming; not ROUGE-Lsum, not COCO's "
    "(β 1.2); the published code prints the middle of an unseeded bootstrap of it",
    "Bert_score": "mean F1 of BERTScore, distilbert-base-uncased layer 5, no idf, no rescaling",
    "Temporal_entity_score": "mean F1 of the sets of words of change (44 keywords); two empty sets count as 1; no "
    "negation, no clinical meaning; not RadEval's, which also tags entities",
}
FLOOR = "Temporal_floor"
VARIANTS = METRICS | {
    FLOOR: "share of references without a word of change: the temporal score of a model that never mentions change"
}

WORDS_OF_CHANGE = frozenset(
    """bigger change cleared constant decrease decreased decreasing elevated elevation enlarged enlargement enlarging
    expanded greater growing improved improvement improving increase increased increasing larger new persistence
    persistent persisting progression progressive reduced removal resolution resolved resolving smaller stability
    stable stably unaltered unchanged unfolded worse worsen worsened worsening""".split()  # noqa: SIM905 - to be read
)
WORSE = frozenset(  # the words of change that say so by themselves, whatever they are said of
    """bigger enlarging growing increase increased increasing larger new progression progressive worse worsen worsened
    worsening""".split()  # noqa: SIM905
)
BETTER = frozenset(
    """cleared decrease decreased decreasing improved improvement improving reduced removal resolution resolved
    resolving smaller""".split()  # noqa: SIM905
)

CONDITIONS = {  # --prior: what the model sees beside the current image
    "true": "the patient's prior",
    "dummy": "the current image again",
    "shuffled": "another patient's prior",
    "reversed": "current and prior swapped",
    "blank": "a black image",
}
MOST = 16  # studies in a batch that --batch-size does not name


def parse(arguments=None):
    parser = Parser(prog="eval.py", description="Answer a question file; score written reports; ask what a prior does.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    answer, score, prior = add_answer(commands), add_score(commands), add_prior(commands)
    arguments = parser.parse_args(arguments)
    if arguments.command == "score":
        alone = ("model_name", "csv", "html", "export", "truth", "merge")
        if arguments.compare and (given := [name for name in alone if getattr(arguments, name)]):
            score.error(f"--{given[0].replace('_', '-')} goes with --predictions, not with --compare")
        if arguments.image_folder and not arguments.html:
            score.error("--image-folder is for the page: give --html as well")
        return arguments
    command = {"answer": answer, "prior": prior}[arguments.command]
    for name in ("batch_size", "limit"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            command.error(f"--{name.replace('_', '-')} {value} is not at least 1")
    if arguments.command == "prior":
        if arguments.model and not arguments.image_folder:
            prior.error("--model answers, and needs --image-folder")
        names = arguments.conditions.split(",")
        if unknown := [name for name in names if name not in CONDITIONS]:
            prior.error(f"--conditions knows {', '.join(CONDITIONS)}, not {unknown[0]!r}")
        arguments.conditions = list(dict.fromkeys(["true", *names]))  # the others are compared with it
    return arguments


def add_answer(commands):
    answer = commands.add_parser(
        "answer",
        help="answer a question file",
        description="Answer every question of a file. What is done is kept: the same command goes on where it was "
        "stopped, to the same bytes. torchrun shares the work.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = answer.add_argument
    add("--model", required=True, metavar="ID_OR_DIR", help="checkpoint: a folder or a hub id")
    add("--image-folder", required=True, metavar="DIR", help="where the questions' image paths begin")
    add("--answers", required=True, metavar="FILE", help="answer file to write (JSONL), in the questions' order")
    add("--prior", default="true", choices=CONDITIONS, help="what is seen as the prior, where a question has one: "
        + "; ".join(f"{name}, {what}" for name, what in CONDITIONS.items()))  # fmt: skip
    add_questions(add)
    return answer


def add_questions(add):
    add("--questions", required=True, metavar="FILE",
        help="question file (JSONL; prepare.py rrg writes one too), or training records (JSON or JSONL), of which the "
        "first question is asked and the first answer is the reference")  # fmt: skip
    add("--ids", metavar="IDS", help="answer these question ids only: a file, one on each line, or a list with commas")
    add("--limit", type=int, metavar="N", help="answer the first N questions only")
    add("--batch-size", type=int, metavar="N", help=f"studies decoded together; without it what fits, up to {MOST}")
    add_model_flags(add)
    add_decoding_flags(add)


def add_prior(commands):
    prior = commands.add_parser(
        "prior",
        help="whether a model uses the prior: answers under several priors, compared",
        description="Answer the questions that have a prior under several priors, one answer file each, and print one "
        "table: every score with its interval, and its paired difference to the true prior. Goes on where it was "
        "stopped.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = prior.add_argument
    add("--model", metavar="ID_OR_DIR", help="checkpoint; without it the answer files in --out are taken as they are")
    add("--image-folder", metavar="DIR", help="where the questions' image paths begin")
    add("--out", required=True, metavar="DIR", help="folder of the answer files, CONDITION.jsonl each")
    add("--conditions", default=",".join(CONDITIONS), metavar="LIST", help="priors to compare, with commas")
    add("--truth", metavar="FILE", help="a phantom hospital's truth.jsonl: what is told of findings and changes, too")
    add("--csv", metavar="FILE", help="write one row for each score and condition")
    add("--json", action="store_true", help="print one JSON object instead of the table")
    add_questions(add)
    return prior


def add_score(commands):
    score = commands.add_parser(
        "score",
        help="scores of an answer file, with intervals",
        description="Score an answer file, or compare two: overall, with and without a prior image, each score with a "
        f"95 % interval ({RESAMPLES:,} bootstrap resamples of the studies).",
    )
    add = score.add_argument
    add("--references", required=True, metavar="FILE",
        help="question file (JSONL): question_id, image, and reference, findings or impression; or training records"
        )  # fmt: skip
    what = score.add_mutually_exclusive_group(required=True)
    what.add_argument("--predictions", metavar="FILE", help="answer file (JSONL): question_id and text")
    what.add_argument("--compare", nargs=2, metavar=("A", "B"), help="two answer files: differences B - A, paired")
    add("--model-name", metavar="NAME", help="name in table, CSV and page; without it the answers' model_id")
    add("--bertscore", action="store_true", help="BERTScore too (needs bert-score and its model)")
    add("--seed", type=int, default=0, metavar="S", help="seed of the bootstrap (default: 0)")
    add("--json", action="store_true", help="print one JSON object instead of the table")
    add("--csv", metavar="FILE", help="append one row with the published columns")
    add("--html", metavar="FILE", help="write one page: scores, and every study beside its reference")
    add("--image-folder", metavar="DIR", help="where the questions' image paths begin; without it the page has none")
    add("--export", metavar="FILE", help="write references and hypotheses as the lists that RadEval takes (JSON)")
    add("--truth", metavar="FILE", help="a phantom hospital's truth.jsonl: what is told of findings, devices, changes")
    add("--merge", nargs="+", default=[], metavar="FILE", help="take in scores that RadEval gave for the export (JSON)")
    return score


if __name__ == "__main__":  # before numpy is imported, so that --help and mistakes answer at once
    ARGUMENTS = parse()

# ruff: noqa: E402
import csv
import errno
import fcntl
import functools
import hashlib
import itertools
import json
import math
import os
import random
import re
import textwrap
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

import checkpoint
import report
import sample
from data import ImageFolder, Question, Records, Study, check, image_names, load_image
from model import ADAPTER_FILES, Libra, Parts, find_device, find_dtype, find_parts
from sample import Options

# ------------------------------------------------------------------------------------------ text


def clean(text: str) -> str:
    """The published cleaning: breaks, dashes and underscores are blanks; of signs only . , : ; ( ) stay."""
    text = re.sub(r"[^\w\s.,:;()]", "", re.sub(r"[\n_-]+", " ", text))
    return re.sub(r"\s{2,}", " ", text).strip()


def words(text: str) -> list[str]:
    """ROUGE's tokens: runs of a-z and 0-9, nothing else."""
    return re.findall(r"[a-z0-9]+", text.lower())


def tokens_13a(text: str) -> list[str]:
    """The tokens of NIST's mteval-v13a: signs apart, but . and , inside numbers stay."""
    text = text.replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, sign in {"&quot;": '"', "&amp;": "&", "&lt;": "<", "&gt;": ">"}.items():
        text = text.replace(entity, sign)
    text = re.sub(r"[!-&(-+/:-@\[-`{-~]", r" \g<0> ", f" {text} ")  # all of ASCII's but ' , - .
    text = re.sub(r"([^0-9])([.,])", r"\1 \2 ", text)
    text = re.sub(r"([.,])([^0-9])", r" \1 \2", text)
    return re.sub(r"([0-9])-", r"\1 - ", text).split()


# ------------------------------------------------------------------------------------------ scores of one pair


def bleu_counts(prediction: str, reference: str, order: int = 4) -> list[int]:
    """What corpus BLEU sums up: matched n-grams [order], predicted n-grams [order], tokens predicted, tokens of the
    reference."""
    predicted, wanted = tokens_13a(prediction), tokens_13a(reference)
    matched, total = [], []
    for n in range(1, order + 1):
        grams = [Counter(zip(*(tokens[i:] for i in range(n)), strict=False)) for tokens in (predicted, wanted)]
        matched.append((grams[0] & grams[1]).total())
        total.append(grams[0].total())
    return [*matched, *total, len(predicted), len(wanted)]


def rouge_l(prediction: str, reference: str) -> float:
    """F1 of the longest common subsequence of the two texts' words, in [0, 1]."""
    predicted, wanted = words(prediction), words(reference)
    places = {}  # word -> its positions in the reference, as bits
    for i, word in enumerate(wanted):
        places[word] = places.get(word, 0) | 1 << i
    row = full = (1 << len(wanted)) - 1  # bit i is 0 where the subsequence grows at position i (Hyyrö 2004)
    for word in predicted:
        hits = row & places.get(word, 0)
        row = (row + hits | row - hits) & full
    common = len(wanted) - row.bit_count()
    return 2 * common / (len(predicted) + len(wanted)) if common else 0.0


def words_of_change(text: str) -> set[str]:
    return WORDS_OF_CHANGE.intersection(re.findall(r"\w+", clean(text).lower()))


def temporal_f1(predicted: set[str], wanted: set[str]) -> float:
    """F1 of two sets with the published epsilons: both empty 1, only the reference empty 1e-10."""
    tiny = 1e-10
    if not wanted:
        return tiny if predicted else 1.0
    common = len(predicted & wanted)
    precision, recall = (common + tiny) / (len(predicted) + tiny), (common + tiny) / (len(wanted) + tiny)
    return 2 * precision * recall / (precision + recall + tiny)


def temporal_f1_score(predictions: list[str], references: list[str] | list[list[str]]) -> dict:
    """{"f1": mean F1 of the words of change, "prediction_entities", "reference_entities": a set for each pair}.

    Of several references to a prediction the words are united. ValueError: lists empty or of two lengths.
    """
    if not predictions or len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions and {len(references)} references: give as many of each")
    predicted = [words_of_change(text) for text in predictions]
    several = [[texts] if isinstance(texts, str) else texts for texts in references]
    wanted = [set().union(*map(words_of_change, texts)) for texts in several]
    f1 = sum(map(temporal_f1, predicted, wanted)) / len(predicted)
    return {"f1": f1, "prediction_entities": predicted, "reference_entities": wanted}


def meteor_scorer() -> Callable[[str, str], float]:
    """(prediction, reference) -> METEOR in [0, 1]; ValueError that says what to install."""
    try:
        from nltk import word_tokenize
        from nltk.corpus import wordnet
        from nltk.translate.meteor_score import single_meteor_score

        wordnet.ensure_loaded()
        word_tokenize("")
    except ImportError:
        raise ValueError("METEOR needs a package: pip install nltk") from None
    except LookupError:
        raise ValueError("METEOR needs NLTK's data: python -m nltk.downloader wordnet punkt_tab") from None
    return lambda prediction, reference: single_meteor_score(word_tokenize(reference), word_tokenize(prediction))


def bertscore(predictions: list[str], references: list[str]) -> list[float]:
    """F1 of each pair in about [0, 1], 0 where a side is empty; ValueError that says what is missing."""
    model, pairs = "distilbert-base-uncased", list(zip(predictions, references, strict=True))
    full = [pair for pair in pairs if all(pair)]  # the package fails on empty ones with transformers 5
    try:
        from bert_score import score
    except ImportError:
        raise ValueError("BERTScore needs a package: pip install bert-score") from None
    try:
        values = iter(score(*map(list, zip(*full, strict=True)), model_type=model)[2] if full else ())
    except OSError:
        raise ValueError(f"BERTScore needs the model {model}: download it once into the hub's cache") from None
    return [float(next(values)) if all(pair) else 0.0 for pair in pairs]


# ------------------------------------------------------------------------------------------ scores of many


def statistics(predictions: list[str], references: list[str], with_bertscore: bool = False, show=lambda *_: None):
    """{key: [N, k]}: what each score needs of each pair so that sums give the score (`score_of`).

    Texts are lowered and cleaned first, as published. Without NLTK or its data METEOR is left out, with a warning.
    """
    predictions, references = ([clean(text.lower()) for text in texts] for texts in (predictions, references))
    pairs = list(zip(predictions, references, strict=True))
    rows = {key: [] for key in METRICS}
    try:
        meteor = meteor_scorer()
    except ValueError as error:
        warnings.warn(f"METEOR is left out. {error}", stacklevel=2)
        meteor = None
    if with_bertscore:
        rows["Bert_score"] = [100 * value for value in bertscore(predictions, references)]
    floor = []
    for i, (prediction, reference) in enumerate(pairs):
        counts = bleu_counts(prediction, reference)
        for n in (1, 2, 3, 4):
            rows[f"BLEU{n}"].append([*counts[:n], *counts[4 : 4 + n], *counts[8:]])
        rows["ROUGE-L"].append(100 * rouge_l(prediction, reference))
        wanted = words_of_change(reference)
        rows["Temporal_entity_score"].append(100 * temporal_f1(words_of_change(prediction), wanted))
        floor.append(100 * (not wanted))
        if meteor:
            rows["METEOR"].append(100 * meteor(prediction, reference))
        show(i + 1, len(pairs))
    rows[FLOOR] = floor
    return {key: np.array(row, dtype=float).reshape(len(pairs), -1) for key, row in rows.items() if row}


def score_of(sums: np.ndarray, count) -> np.ndarray:
    """Sums of statistics [..., k] over count pairs -> the score [...].

    k = 1: their mean; k = 2: hits of chances × 100, NaN without a chance; k = 2n + 2: BLEU-n × 100.
    """
    width = sums.shape[-1]
    if width == 1:
        return sums[..., 0] / count
    if width == 2:
        with np.errstate(invalid="ignore"):
            return 100 * sums[..., 0] / sums[..., 1]
    order = width // 2 - 1
    matched, total = sums[..., :order], sums[..., order : 2 * order]
    predicted, wanted = sums[..., -2], sums[..., -1]
    with np.errstate(divide="ignore", invalid="ignore"):
        log_bleu = np.log(matched / total).mean(-1) + np.minimum(0, 1 - wanted / predicted)
    return np.where((matched > 0).all(-1), 100 * np.exp(log_bleu), 0.0)


def resample(table: dict[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    """{key: [N, k]} -> {key: [RESAMPLES]}: every score on the same seeded resamples of the N studies."""
    rows = np.concatenate(list(table.values()), axis=1)
    count, generator = len(rows), np.random.default_rng(seed)
    draw = lambda: np.bincount(generator.integers(count, size=count), minlength=count)
    sums = np.stack([draw() @ rows for _ in range(RESAMPLES)])  # [RESAMPLES, all k]
    ends = np.cumsum([column.shape[1] for column in table.values()])
    return {key: score_of(part, count) for key, part in zip(table, np.split(sums, ends[:-1], axis=1), strict=True)}


@dataclass(frozen=True)
class Interval:
    """A value and its 95 % interval (percentiles of the bootstrap); None, None where only the value is known."""

    value: float
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, value, resampled) -> "Interval":
        return cls(float(value), *map(float, np.nanpercentile(resampled, [2.5, 97.5])))

    def __str__(self):
        return format(self)

    def __format__(self, sign):
        """f"{interval:+}" gives every number its sign."""
        show = lambda number: format(round(number, 2) + 0.0, f"{sign}.2f")  # never -0.00
        return show(self.value) + ("" if self.low is None else f" [{show(self.low)}, {show(self.high)}]")


def intervals(table: dict[str, np.ndarray], groups: dict[str, np.ndarray], seed: int = 0):
    """{key: {group: Interval}}; groups are {name: [N] of bool}. A group in which nothing can be scored is left out."""
    result = {key: {} for key in table}
    for group, chosen in groups.items():
        part = {key: column[chosen] for key, column in table.items()}
        for key, values in resample(part, seed).items():
            value = score_of(part[key].sum(0), chosen.sum())
            if not np.isnan(value):
                result[key][group] = Interval.of(value, values)
    return result


def differences(a: dict[str, np.ndarray], b: dict[str, np.ndarray], groups: dict[str, np.ndarray], seed: int = 0):
    """{key: {group: (score of A, score of B, Interval of B - A)}}, both on the same resamples of the studies."""
    result = {key: {} for key in a if key in b and key != FLOOR}
    for group, chosen in groups.items():
        part = {(key, side): table[key][chosen] for key in result for side, table in enumerate((a, b))}
        values = resample(part, seed)
        for key in result:
            one, two = (float(score_of(part[key, side].sum(0), chosen.sum())) for side in (0, 1))
            result[key][group] = (one, two, Interval.of(two - one, values[key, 1] - values[key, 0]))
    return result


def published(scores: dict[str, float]) -> dict[str, float]:
    """The published dict: its keys in its order, two digits."""
    return {key: round(float(scores[key]), 2) for key in METRICS if key in scores}


def evaluate_report(references, predictions, bertscore: bool = False) -> dict[str, float]:
    """Two JSONL files -> the published scores: {"BLEU1": …, …, "Temporal_entity_score": …}, × 100, two digits.

    As the published function, but pairs are joined by question_id, ROUGE-L is the plain mean, and Bert_score comes only
    when asked for. METEOR is missing, with a warning, where NLTK is.
    """
    pairs = read_pairs(references, predictions)
    table = statistics([pair.prediction for pair in pairs], [pair.reference for pair in pairs], bertscore)
    return published({key: score_of(column.sum(0), len(pairs)) for key, column in table.items()})


# ------------------------------------------------------------------------------------------ files


@dataclass(frozen=True)
class Pair:
    """A study's question, its reference and what was predicted. images: paths as in the question, current first."""

    id: str
    reference: str
    prediction: str
    prompt: str
    images: tuple[str, ...]
    model: str | None

    @property
    def has_prior(self) -> bool:
        """A second image that is not the first again (the published stand-in for a missing one)."""
        return len(self.images) == 2 and self.images[0] != self.images[1]


def read_lines(path) -> list[dict]:
    """The objects of a question or answer file; a training record as a question. ValueError that names the line."""
    records, found = Records(path), []
    for number, raw in enumerate(records):
        if "conversations" in raw:
            try:
                question = Question.parse(raw)
            except ValueError as error:
                raise ValueError(f"{records.place(number)}: {error}") from None
            raw = {"question_id": question.id, "image": question.images, "text": question.text,
                   "reference": question.reference}  # fmt: skip
        if not isinstance(raw.get("question_id"), str | int):
            raise ValueError(f"{records.place(number)} has no question_id: give one object with it on each line")
        found.append(raw)
    if not found:
        raise ValueError(f"{path} is empty: give one JSON object on each line")
    return found


def text_of(record: dict, fields: tuple[str, ...], path) -> str:
    """The first of the fields that a record has."""
    text = next((record[field] for field in fields if record.get(field) is not None), None)
    if not isinstance(text, str):
        problem = "has none of" if text is None else "has no text in"
        raise ValueError(f"{path}: {record['question_id']} {problem} {', '.join(fields)}: add its report")
    return text


def images_of(record: dict, path) -> tuple[str, ...]:
    images = record.get("image") or []
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or len(images) > 2 or not all(isinstance(image, str) for image in images):
        raise ValueError(f"{path}: {record['question_id']} has an image that is neither a path nor [current, prior]")
    return tuple(images)


def read_pairs(references, predictions, chosen: Iterable[str] | None = None) -> list[Pair]:
    """Question file + answer file -> pairs in the questions' order; chosen: ids of the only ones that are wanted.

    ValueError with counts where an id is missing, comes twice, or is in the answers alone. A reference is the first of
    reference, findings, impression; a prediction the first of findings, impression, text, as published.
    """
    files, problems = {}, []
    for path in (references, predictions):
        records = read_lines(path)
        files[path] = {str(record["question_id"]): record for record in records}
        counts = Counter(str(record["question_id"]) for record in records)
        problems.append((f"come twice in {path}", [id for id, count in counts.items() if count > 1]))
    questions, answers = files[references], files[predictions]
    if chosen is not None:
        questions, unwanted = {id: questions[id] for id in chosen}, questions.keys() - set(chosen)
        answers = {id: answer for id, answer in answers.items() if id not in unwanted}
    problems.append((f"of {references} are missing in {predictions}", [id for id in questions if id not in answers]))
    problems.append((f"of {predictions} are not in {references}", [id for id in answers if id not in questions]))
    if found := [f"{len(ids):,} ids {what} (first: {ids[0]})" for what, ids in problems if ids]:
        raise ValueError(f"questions and answers do not match: {'; '.join(found)}")
    return [
        Pair(
            id,
            text_of(question, ("reference", "findings", "impression"), references),
            text_of(answers[id], ("findings", "impression", "text"), predictions),
            str(question.get("text") or ""),
            images_of(question, references),
            answers[id].get("model_id"),
        )
        for id, question in questions.items()
    ]


def groups_of(pairs: list[Pair]) -> dict[str, np.ndarray]:
    """{"all", "with prior", "without prior"} -> [N] of bool; empty groups are left out."""
    prior = np.array([pair.has_prior for pair in pairs])
    groups = {"all": np.ones(len(pairs), bool), "with prior": prior, "without prior": ~prior}
    split = any(pair.images for pair in pairs)  # without any images nobody knows
    return {name: chosen for name, chosen in groups.items() if name == "all" or (split and chosen.any())}


def write_export(path, pairs: list[Pair]):
    """What RadEval takes: two aligned lists of the texts as they are. question_id is there for the reader."""
    lists = {"question_id": [pair.id for pair in pairs], "references": [pair.reference for pair in pairs]}
    with atomic(path) as file:
        json.dump(lists | {"hypotheses": [pair.prediction for pair in pairs]}, file, ensure_ascii=False, indent=1)


def read_merge(paths, count: int) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """RadEval's results for the export -> ({key: [N, 1]} where it gave a value per study, {key: value} elsewhere)."""
    columns, values = {}, {}
    number = lambda value: isinstance(value, int | float) and math.isfinite(value)
    for path in paths:
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not JSON ({error}): save RadEval's result with json.dump") from None
        if not isinstance(content, dict):
            raise ValueError(f"{path} is no JSON object: save RadEval's result with json.dump")
        for key, value in content.items():
            if key in VARIANTS or key in columns or key in values:
                raise ValueError(f"{path}: {key} is there already: rename it or leave the file out")
            if number(value):
                values[key] = float(value)
            elif isinstance(value, list) and len(value) == count and all(map(number, value)):
                columns[key] = np.array(value, dtype=float)[:, None]
            else:
                raise ValueError(f"{path}: {key} is neither a number nor {count:,} numbers, one for each study: "
                                 "score the file that --export wrote, without details")  # fmt: skip
    return columns, values


def check_csv(path, header: list[str]):
    """ValueError where the file is there with other columns."""
    if not Path(path).exists():
        return
    with open(path, encoding="utf-8-sig", newline="") as file:
        found = next(csv.reader(file), header)
    if found != header:
        raise ValueError(f"{path} has the columns {', '.join(found)}, not {', '.join(header)}: give another file")


def append_csv(path, header: list[str], row: dict):
    """One more row, with the header where the file is new."""
    before = Path(path).read_text(encoding="utf-8-sig") if Path(path).exists() else ""
    with atomic(path) as file:
        file.write(before + ("\n" if before and not before.endswith("\n") else ""))
        writer = csv.DictWriter(file, header, lineterminator="\n")
        if not before:
            writer.writeheader()
        writer.writerow(row)


# ------------------------------------------------------------------------------------------ phantom reports

FINDINGS = ("consolidation", "atelectasis", "edema", "nodule", "pleural effusion", "pneumothorax", "cardiomegaly")
DEVICES = ("endotracheal tube", "central line", "pacemaker")
SIDED = ("consolidation", "atelectasis", "nodule", "pleural effusion", "pneumothorax")  # whose side reports name
SAID = {  # word -> what it says of the finding in whose clause it stands
    "change": {"new": "new", "increased": "worse", "worsened": "worse", "unchanged": "unchanged", "stable": "unchanged",
               "decreased": "improved", "improved": "improved", "resolved": "resolved", "removal": "removed",
               "removed": "removed"},
    "side": {"right": "right", "left": "left", "bilateral": "bilateral"},
    "level": {"small": 0, "mild": 0, "moderate": 1, "large": 2, "severe": 2},
}  # fmt: skip
LEVELS = (0.43, 0.72)  # severities from which a finding is moderate, large


def read_report(text: str) -> dict[str, dict]:
    """{finding or device: {"change", "side", "level": what is said of it, or None}}; what is denied is left out.

    A clause ends at . or ; or but. "no" and "without" deny what follows in it; a side or a level belongs to the next
    name, a change to all names of its clause.
    """
    found = {}
    for clause in re.split(r"[.;](?!\d)|\bbut\b", " ".join(text.lower().split())):
        said, before = re.findall(rf"{'|'.join(FINDINGS + DEVICES)}|[a-z]+", clause), {}
        change = next((SAID["change"][word] for word in said if word in SAID["change"]), None)
        for word in said:
            if word in ("no", "without"):
                break
            if word in FINDINGS + DEVICES:
                found[word] = {"change": change, "side": before.pop("side", None), "level": before.pop("level", None)}
            before |= {kind: says[word] for kind, says in SAID.items() if word in says}
    return found


def read_truth(path, pairs: list[Pair]) -> list[dict]:
    """A phantom hospital's truth, one of each pair, found by the current image's name or by the id."""
    lines = {}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
            lines |= dict.fromkeys((record["dicom_id"], str(record["study_id"])), record)
            record["findings"], record["devices"], record["changes"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path} line {number} is no line of a phantom hospital's truth.jsonl") from None
    keys = [next((key for key in (*(Path(image).stem for image in pair.images[:1]), pair.id) if key in lines), None)
            for pair in pairs]  # fmt: skip
    if lost := [pair.id for pair, key in zip(pairs, keys, strict=True) if key is None]:
        raise ValueError(f"{path} has no line for {len(lost):,} of {len(pairs):,} studies (first: {lost[0]})")
    return [lines[key] for key in keys]


def truth_statistics(predictions: list[str], truths: list[dict]) -> dict[str, np.ndarray]:
    """{score: [N, 2], hits and chances}.

    Precision, recall and F1 of findings, of devices, and of each. Of findings that are there and told: side, where the
    hospital names one, and severity in its three words. Direction: of all changes of findings, those told so.
    """
    groups = ("findings", "devices", *FINDINGS, *DEVICES)
    scores = [f"{group} {kind}" for group in groups for kind in ("precision", "recall", "F1")]
    rows = {score: np.zeros((len(truths), 2)) for score in ("side", "severity", "direction of change", *scores)}
    for i, (text, truth) in enumerate(zip(predictions, truths, strict=True)):
        report, there = read_report(text), truth["findings"] | truth["devices"]
        for name in FINDINGS + DEVICES:
            told, real = report.get(name, {}), name in there
            said = bool(told) and told["change"] not in ("resolved", "removed")
            for group in (name, "findings" if name in FINDINGS else "devices"):
                rows[f"{group} precision"][i] += said and real, said
                rows[f"{group} recall"][i] += said and real, real
                rows[f"{group} F1"][i] += 2 * (said and real), said + real
            if name in FINDINGS and said and real:
                level = sum(there[name]["severity"] >= limit for limit in LEVELS)
                rows["severity"][i] += told["level"] == level, 1
                rows["side"][i] += name in SIDED and told["side"] == there[name]["side"], name in SIDED
            if name in FINDINGS and name in truth["changes"]:
                rows["direction of change"][i] += told.get("change") == truth["changes"][name], 1
    return rows


# ------------------------------------------------------------------------------------------ answers


def choose(records: Records, ids: str | None, limit: int | None, only_priors: bool = False) -> dict[str, int]:
    """{id: row} of the questions to answer, in the file's order: those with a prior, of these --ids, of these --limit.

    ids: a file with one on each line, or a list with commas. ValueError where the file or an id is wrong.
    """
    check(records, Question)
    questions = enumerate(map(Question.parse, records))
    rows = {str(question.id): row for row, question in questions if len(question.images) == 2 or not only_priors}
    kind = " with a prior" * only_priors
    if not rows:
        raise ValueError(f"{records.path} has no question{kind}")
    if ids is not None:
        text = Path(ids).read_text(encoding="utf-8") if os.path.isfile(ids) else ids.replace(",", "\n")
        wanted = set(filter(None, map(str.strip, text.splitlines())))
        if unknown := sorted(wanted - rows.keys()):
            more = f" (and {len(unknown) - 1:,} more of --ids)" if unknown[1:] else ""
            raise ValueError(f"{records.path} has no question {unknown[0]}{kind}{more}")
        rows = {id: row for id, row in rows.items() if id in wanted}
    return dict(itertools.islice(rows.items(), limit))


@dataclass(frozen=True)
class Asked:
    """Questions {id: row of the file}, and what a model sees of them under one of the CONDITIONS."""

    records: Records
    rows: dict[str, int]
    condition: str
    folder: ImageFolder
    shuffled: Callable[[Question], str]  # question -> another patient's prior

    BLACK = ""  # the name of a black image

    def questions(self, ids: Iterable[str]) -> Iterator[Question]:
        return (Question.parse(self.records[self.rows[id]]) for id in ids)

    def names(self, question: Question) -> list[str]:
        """Of the images that are seen, current first; those of the question where it has no prior."""
        if len(question.images) < 2 or self.condition == "true":
            return question.images
        current, prior = question.images
        if self.condition == "shuffled":
            return [current, self.shuffled(question)]
        return {"dummy": [current], "reversed": [prior, current], "blank": [current, self.BLACK]}[self.condition]

    def study(self, question: Question) -> Study:
        names = self.names(question)
        images = [self.folder.find(name) for name in names if name != self.BLACK]
        if self.BLACK in names:
            images.append(Image.new("L", load_image(images[0]).size))
        return Study(*images, query=question.text, id=str(question.id))

    def find_images(self):
        """ValueError that names the question where an image is missing."""
        for question in self.questions(self.rows):
            with naming(question):
                for name in filter(None, self.names(question)):
                    self.folder.find(name)

    def lengths(self, libra: Libra, template: str | None, options: Options) -> dict[str, int]:
        """{id: positions of the prompt}; ValueError that names the question where it is too long."""
        found = {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of reports that may grow too long `prefill` warns
            for id, question in zip(self.rows, self.questions(self.rows), strict=True):
                with naming(question):
                    found[id] = sample.check_length(libra, sample.prompt_of(libra, question.text, template), options)
        return found

    def prepare(self, libra: Libra, batch: list[str]) -> list[tuple[Question, Study, torch.Tensor]]:
        """Question, study and pixels of each; ValueError that names the question where an image cannot be read."""
        prepared = []
        for question in self.questions(batch):
            with naming(question):
                study = self.study(question)
                prepared.append((question, study, libra.preprocess(study.images())))
        return prepared


@contextmanager
def naming(question: Question):
    """What goes wrong with a question names it."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise ValueError(f"question {question.id}: {error}") from None


def shuffle_priors(records: Records, seed: int) -> Callable[[Question], str]:
    """A function: question -> another patient's prior, drawn by (seed, question id) from all priors of the file.

    A patient is the folder pNNNNNNNN in an image's path; where there is none, every prior is a patient of its own.
    """
    patient = lambda name: next((part for part in Path(name).parts if re.fullmatch(r"p\d{8}", part)), name)
    priors = [names[1] for names in map(image_names, records) if len(names) == 2]
    patients = list(map(patient, priors))
    if len(set(patients)) == 1:
        raise ValueError(f"{records.path} has priors of one patient only: there is no other's to show")

    def draw(question: Question) -> str:
        dice, own = random.Random(f"{seed}/{question.id}"), patient(question.images[1])
        while patients[place := dice.randrange(len(priors))] == own:
            pass
        return priors[place]

    return draw


def fitting(libra: Libra, positions: int, options: Options, ranks: int) -> int:
    """Studies in a batch, 1 to MOST: as many as have room for cache and logits in half of the free memory.

    The other half is for what does not grow with them, or little: a prefill, and copies while suffixes grow and move.
    positions: of the longest prompt. Of several processes all take the least, so that they cut the same batches.
    """
    config = libra.decoder.config
    position = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * libra.dtype.itemsize
    suffixes = options.num_beams * (options.max_new_tokens * position + 4 * 4 * libra.vocabulary)  # float32, 4 copies
    free = checkpoint.free_memory(libra.device) // (ranks if libra.device.type == "cpu" else 1)
    size = torch.tensor(max(1, min(MOST, free // 2 // (positions * position + suffixes))))
    if ranks > 1:
        dist.all_reduce(size, dist.ReduceOp.MIN)
    return int(size)


def fingerprint(parts: Parts) -> str:
    """Tells a model from others and from itself after more training: its config, 64 samples of each file of weights."""
    digest = hashlib.sha256(json.dumps(parts.config, sort_keys=True).encode())
    adapters = [checkpoint.find_file(source, ADAPTER_FILES) for source in parts.adapters]
    for path in (*checkpoint.weight_files(parts.weights), *parts.overlays, *filter(None, adapters)):
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            for place in range(0, size, size // 64 + 1):
                file.seek(place)
                digest.update(file.read(4096))
    return digest.hexdigest()[:16]


@contextmanager
def processes() -> Iterator[tuple[int, int]]:
    """(this process's rank, how many torchrun has started); (0, 1) without it."""
    count = int(os.environ.get("WORLD_SIZE", 1))
    if count == 1:
        yield 0, 1
        return
    dist.init_process_group("gloo", timeout=timedelta(days=30))  # the first to be done waits for the last
    try:
        yield dist.get_rank(), count
    finally:
        dist.destroy_process_group()


def meet():
    """Wait until every process is here."""
    if dist.is_initialized():
        dist.barrier()


def load_model(arguments) -> Libra:
    """On a machine with several GPUs each of torchrun's processes takes its own."""
    if find_device(arguments.device) == torch.device("cuda") and dist.is_initialized():
        arguments.device = f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
    return sample.load(arguments)


def work_files(answers: Path) -> list[Path]:
    """The answers of each rank, in the order in which they were finished; they go when the answer file is whole."""
    name = re.compile(rf"\.{re.escape(answers.name)}\.\d+")
    return sorted(path for path in answers.parent.iterdir() if name.fullmatch(path.name))


def whole_lines(path) -> Iterator[tuple[int, bytes]]:
    """(first byte, line) of every line of a work file; a last one without its break is torn, and left out."""
    place = 0
    with open(path, "rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield place, line
            place += len(line)


def find_answers(answers: Path) -> dict[str, tuple[Path, int]]:
    """{question id: (work file, first byte of its line)}."""
    lines = ((path, *line) for path in work_files(answers) for line in whole_lines(path))
    return {str(json.loads(line)["question_id"]): (path, place) for path, place, line in lines}


@contextmanager
def own_work_file(answers: Path, rank: int):
    """A rank's work file, to append whole lines to; ValueError where another process has it."""
    path = answers.with_name(f".{answers.name}.{rank}")
    with open(path, "ab", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # goes with this process, however it ends
        except OSError:
            raise ValueError(f"{answers} is being written by another process: wait for it") from None
        try:
            file.truncate(sum(len(line) for _, line in whole_lines(path)))
            yield file
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
                raise
            raise OSError(f"{answers}: {error.strerror}: make room and run this again, what is done is kept") from None
        finally:
            if path.exists() and not path.stat().st_size:
                path.unlink()


def sidecar_of(answers: Path) -> Path:
    return answers.with_name(f"{answers.name}.settings.json")


def settings_of(arguments, asked: Asked) -> dict:
    """All that an answer file depends on."""
    parts, device = find_parts(arguments.model, arguments.base), find_device(arguments.device)
    questions = hashlib.sha256()
    with open(asked.records.path, "rb") as file:
        while block := file.read(1 << 20):
            questions.update(block)
    ids = hashlib.sha256("\n".join(asked.rows).encode())
    return {
        "model": arguments.model, "base": arguments.base, "encoder": arguments.encoder, "weights": fingerprint(parts),
        "dtype": str(find_dtype(arguments.dtype, device, parts.config)).removeprefix("torch."), "device": device.type,
        "template": arguments.template, "questions": questions.hexdigest()[:16],
        "asked": f"{len(asked.rows)} ids ({ids.hexdigest()[:16]})", "prior": asked.condition,
        "image_folder": asked.folder.root, "batch_size": arguments.batch_size,
    } | asdict(sample.options_of(arguments))  # fmt: skip


def begun_with(answers: Path, settings: dict) -> dict | None:
    """The settings that an answer file, or what is done of it, was made with; None where nothing is.

    ValueError or OSError where they are not `settings`; where these leave the batch size open it may be any.
    """
    there, sidecar = [path for path in (answers, *work_files(answers)) if path.exists()], sidecar_of(answers)
    if not (answers.exists() or find_answers(answers)):
        return None
    if not sidecar.exists():
        raise FileExistsError(f"{there[0]} is there, and no {sidecar.name} says how it was made: delete it, or move it")
    begun = checkpoint.read_json(sidecar)
    settings = settings | {"batch_size": settings["batch_size"] or begun.get("batch_size")}
    changed = [f"{name} {begun.get(name)}, not {value}" for name, value in settings.items() if begun.get(name) != value]
    if changed:
        delete = ", ".join(map(str, (*there, sidecar)))
        raise ValueError(f"{answers} was made with {'; '.join(changed)}: give another file, or delete {delete}")
    return begun


def write_answers(arguments, asked: Asked, answers: Path, load: Callable[[], Libra], rank: int, ranks: int):
    """Write an answer file, or what is missing of it.

    Batches are cut from all the questions before it is looked what is answered, so that a rerun, or more processes,
    decode the same batches. A finished batch goes to a work file beside the answers; at the end these are merged, in
    the questions' order. FILE.settings.json says what it was made with. load() gives the model when it is needed.
    """
    if not answers.parent.is_dir():
        raise FileNotFoundError(f"no folder {answers.parent} for {answers.name}: make it, or check the path")
    settings = settings_of(arguments, asked)
    with own_work_file(answers, rank) as work:
        begun = begun_with(answers, settings)
        whole = answers.exists()
        meet()
        if not whole:
            asked.find_images()  # before the model is read
            libra = load()
            options, template = sample.options_of(arguments), arguments.template
            lengths = asked.lengths(libra, template, options)
            size = arguments.batch_size or (begun and begun["batch_size"])
            size = size or fitting(libra, max(lengths.values()), options, ranks)
            order = sorted(asked.rows, key=lengths.get, reverse=True)  # what does not fit shows at once
            batches = [order[i : i + size] for i in range(0, len(order), size)]
            done = find_answers(answers).keys()
            mine = [batch for batch in batches if not done >= set(batch)][rank::ranks]
            meet()
            if rank == 0 and not begun:
                with atomic(sidecar_of(answers)) as file:
                    file.write(json.dumps(settings | {"batch_size": size}, indent=1) + "\n")
            meet()
            show = progress(f"answering {answers.name}" + f" (process 1 of {ranks})" * (ranks > 1), "studies")
            finished, total = 0, sum(map(len, mine))
            for lines in decode_batches(libra, asked, mine, template, options, arguments.model):
                data = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
                while data:
                    data = data[work.write(data) :]
                os.fsync(work.fileno())
                finished += len(lines)
                if rank == 0:
                    show(finished, total)
            meet()
            if rank == 0:
                merge(answers, asked.rows)
        if rank == 0:
            for path in work_files(answers):
                path.unlink()
            there = ", all there before" if whole else ""
            print(f"{answers}: {len(asked.rows):,} answers{there}", file=sys.stderr)
        meet()


def decode_batches(libra: Libra, asked: Asked, batches: list[list[str]], template, options: Options, model: str):
    """The lines of each batch; the images of the next one are read while it is decoded."""
    with ThreadPoolExecutor(1) as pool:
        ahead = [pool.submit(asked.prepare, libra, batch) for batch in batches[:1]]
        for number in range(len(batches)):
            questions, studies, pixels = zip(*ahead.pop().result(), strict=True)
            ahead = [pool.submit(asked.prepare, libra, batch) for batch in batches[number + 1 : number + 2]]
            try:
                prefix = sample.prefill(libra, list(studies), template, options, pixels)
                outputs = sample.decode(libra, prefix, options)
            except torch.OutOfMemoryError:
                raise MemoryError(
                    f"{len(studies)} studies together do not fit on {libra.device}: give a smaller --batch-size"
                ) from None
            yield [
                {"question_id": question.id, "prompt": question.text, "text": best.text, "model_id": model}
                for question, (best, *_) in zip(questions, outputs, strict=True)
            ]


def merge(answers: Path, ids: Iterable[str]):
    """All work files -> the answer file, its lines in the order of the ids."""
    places = find_answers(answers)
    with ExitStack() as stack, atomic(answers, "wb") as file:
        opened = {path: stack.enter_context(open(path, "rb")) for path in work_files(answers)}
        for id in ids:
            path, place = places[id]
            opened[path].seek(place)
            file.write(opened[path].readline())


# ------------------------------------------------------------------------------------------ what a prior does

CHANGED, FLIPPED = "reports changed", "directions flipped"


def flips(true: str, other: str) -> tuple[int, int]:
    """Of the words of direction (WORSE, BETTER) in a report, each once, how many flip in another one; how many it has.

    A word flips where the other report lacks it and has, in its stead, a word of the opposite direction that this one
    lacks.
    """
    before, after = words_of_change(true), words_of_change(other)
    gone, come = before - after, after - before
    flipped = len(gone & WORSE) * bool(come & BETTER) + len(gone & BETTER) * bool(come & WORSE)
    return flipped, len(before & (WORSE | BETTER))


def prior_scores(texts: dict[str, list[str]], references: list[str], truths: list[dict] | None, seed: int) -> dict:
    """{score: {condition: (its Interval, the Interval of its difference to "true", if it has one)}}.

    texts: {condition: [N]}, "true" first; references: [N]. All intervals are over the same resamples of the N studies.
    Beside the scores stand, of the other conditions, the share of reports that differ from those under "true" and the
    share of words of direction that flip (`flips`).
    """
    groups, tables, result = {"": np.ones(len(references), bool)}, {}, {}
    for condition, predictions in texts.items():
        table = statistics(predictions, references, show=progress(f"scoring {condition}"))
        if truths:
            told = truth_statistics(predictions, truths)
            table |= {key: told[key] for key in ("findings F1", "devices F1", "direction of change")}
        if condition != "true":
            del table[FLOOR]
            pairs = list(zip(texts["true"], predictions, strict=True))
            table[CHANGED] = np.array([[100.0 * (one != two)] for one, two in pairs])
            table[FLIPPED] = np.array([flips(*pair) for pair in pairs], dtype=float)
        found = {key: values[""] for key, values in intervals(table, groups, seed).items() if values}
        tables[condition] = {key: table[key] for key in found}
        gaps = differences(tables["true"], tables[condition], groups, seed) if condition != "true" else {}
        for key, interval in found.items():
            result.setdefault(key, {})[condition] = (interval, gaps[key][""][2] if key in gaps else None)
    return result


def prior(arguments):
    records, out = Records(arguments.questions), Path(arguments.out)
    rows = choose(records, arguments.ids, arguments.limit, only_priors=True)
    files = {condition: out / f"{condition}.jsonl" for condition in arguments.conditions}
    with processes() as (rank, ranks):
        load = functools.cache(lambda: load_model(arguments))
        for condition, path in files.items():
            if arguments.model:
                out.mkdir(parents=True, exist_ok=True)
                write_answers(arguments, ask(arguments, records, rows, condition), path, load, rank, ranks)
    if rank:
        return
    pairs = {condition: read_pairs(arguments.questions, path, rows) for condition, path in files.items()}
    texts = {condition: [pair.prediction for pair in found] for condition, found in pairs.items()}
    truths = read_truth(arguments.truth, pairs["true"]) if arguments.truth else None
    scores = prior_scores(texts, [pair.reference for pair in pairs["true"]], truths, arguments.seed)
    name = arguments.model or pairs["true"][0].model or out.name
    if arguments.csv:
        write_prior_csv(arguments.csv, name, scores)
    if arguments.json:
        cell = lambda value, gap: vars(value) | {"difference": gap and vars(gap)}
        plain = {key: {name: cell(*pair) for name, pair in found.items()} for key, found in scores.items()}
        return print(json.dumps({"model": name, "studies": len(rows), "scores": plain}))
    print(f"{name}, {len(rows):,} studies with a prior: score × 100 [95 % interval], and its paired difference to true")
    lines = [["", *texts]]
    for key, found in scores.items():
        lines.append([key, *(str(found[condition][0]) if condition in found else "" for condition in texts)])
        if any(gap for _, gap in found.values()):
            gaps = (found[condition][1] if condition in found else None for condition in texts)
            lines.append(["  minus true", *(f"{gap:+}" if gap else "" for gap in gaps)])
    print_table(lines)
    print("; ".join(f"{condition}: {CONDITIONS[condition]}" for condition in texts))
    count = sum(flips(text, text)[1] for text in texts["true"])
    note = (
        f"{FLIPPED}: of {count:,} words of direction in the reports under true, the share that the other report lacks "
        "while it has a word of the opposite direction that the first lacks (worse: "
        f"{', '.join(sorted(WORSE))}; better: {', '.join(sorted(BETTER))})"
    )
    print(textwrap.fill(note, 120))


def write_prior_csv(path, name: str, scores: dict):
    """One row for each score and condition."""
    ends = ("value", "low", "high")
    with atomic(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["Model Name", "score", "prior", *ends, *(f"difference {end}" for end in ends)])
        for key, found in scores.items():
            for condition, cells in found.items():
                numbers = [getattr(interval, end) if interval else "" for interval in cells for end in ends]
                writer.writerow([name, key, condition, *numbers])


def ask(arguments, records: Records, rows: dict[str, int], condition: str) -> Asked:
    shuffled = shuffle_priors(records, arguments.seed) if condition == "shuffled" else None
    return Asked(records, rows, condition, ImageFolder(arguments.image_folder, None), shuffled)


def answer(arguments):
    records = Records(arguments.questions)
    rows = choose(records, arguments.ids, arguments.limit)
    with processes() as (rank, ranks):
        asked = ask(arguments, records, rows, arguments.prior)
        write_answers(arguments, asked, Path(arguments.answers), lambda: load_model(arguments), rank, ranks)


# ------------------------------------------------------------------------------------------ command line


def print_table(rows: list[list[str]]):
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def score(arguments):
    if arguments.compare:
        return compare(arguments)
    pairs = read_pairs(arguments.references, arguments.predictions)
    if arguments.export:
        write_export(arguments.export, pairs)
    columns, values = read_merge(arguments.merge, len(pairs))
    notes = VARIANTS | dict.fromkeys((*columns, *values), "as RadEval gave it")
    if arguments.truth:
        truths = read_truth(arguments.truth, pairs)
        columns |= truth_statistics([pair.prediction for pair in pairs], truths)
    header = ["Model Name", *METRICS, *columns, *values]
    if arguments.csv:
        check_csv(arguments.csv, header)
    name = arguments.model_name or pairs[0].model or Path(arguments.predictions).stem
    texts = [pair.prediction for pair in pairs], [pair.reference for pair in pairs]
    table = statistics(*texts, arguments.bertscore, progress("scoring")) | columns
    groups = groups_of(pairs)
    scores = intervals(table, groups, arguments.seed) | {key: {"all": Interval(value)} for key, value in values.items()}
    sizes = {group: int(chosen.sum()) for group, chosen in groups.items()}
    whole = {key: found["all"].value for key, found in scores.items() if found}
    row = published(whole)
    if arguments.csv:
        more = {key: round(whole[key], 4) for key in (*columns, *values) if key in whole}
        append_csv(arguments.csv, header, {"Model Name": name} | row | more)
    if arguments.html:
        each = {key: score_of(column, 1) for key, column in table.items() if key != FLOOR and column.shape[1] != 2}
        write_page(arguments, name, pairs, sizes, scores, notes, each)
    if arguments.json:
        plain = {key: {group: vars(interval) for group, interval in found.items()} for key, found in scores.items()}
        variants = {key: VARIANTS[key] for key in scores if key in VARIANTS}
        result = {"model": name, "studies": sizes, "published": row, "scores": plain, "variants": variants}
        return print(json.dumps(result))
    print(f"{name}: mean or corpus score × 100 [95 % interval]")
    head = ["", *(f"{group} ({size:,})" for group, size in sizes.items())]
    print_table([head, *([key, *(str(found.get(group, "")) for group in sizes)] for key, found in scores.items())])
    print(f"{FLOOR}: {VARIANTS[FLOOR]}")


def write_page(arguments, name, pairs, sizes, scores, notes, each):
    report.write(
        arguments.html,
        title=name,
        subtitle=f"{Path(arguments.predictions).name} against {Path(arguments.references).name}",
        groups=sizes,
        scores=[
            {"key": key, "note": notes.get(key, ""),
             "values": {group: [x.value, x.low, x.high] for group, x in found.items()}}
            for key, found in scores.items()
        ],
        studies=[
            {"id": pair.id, "prior": pair.has_prior, "prompt": pair.prompt, "reference": pair.reference,
             "prediction": pair.prediction, "images": pair.images,
             "values": [round(float(column[i]), 2) for column in each.values()]}
            for i, pair in enumerate(pairs)
        ],
        metrics=list(each),
        words=sorted(WORDS_OF_CHANGE),
        folder=arguments.image_folder,
        show=progress("thumbnails"),
    )  # fmt: skip


def compare(arguments):
    a, b = (read_pairs(arguments.references, path) for path in arguments.compare)
    tables = [
        statistics([pair.prediction for pair in pairs], [pair.reference for pair in pairs],
                   arguments.bertscore, progress(f"scoring {path}"))
        for pairs, path in zip((a, b), arguments.compare, strict=True)
    ]  # fmt: skip
    groups = groups_of(a)
    result = differences(*tables, groups, arguments.seed)
    if arguments.json:
        plain = {
            key: {group: {"a": one, "b": two, "difference": vars(gap)} for group, (one, two, gap) in found.items()}
            for key, found in result.items()
        }
        sizes = {group: int(chosen.sum()) for group, chosen in groups.items()}
        names = dict(zip("ab", arguments.compare, strict=True))
        return print(json.dumps(names | {"studies": sizes, "scores": plain}))
    print(f"A: {arguments.compare[0]}\nB: {arguments.compare[1]}")
    for group, chosen in groups.items():
        print(f"\n{group} ({chosen.sum():,})")
        rows = [(key, *found[group]) for key, found in result.items()]
        print_table([["", "A", "B", "B - A [95 % interval, paired]"],
                     *([key, f"{one:.2f}", f"{two:.2f}", str(gap)] for key, one, two, gap in rows)])  # fmt: skip


def run(arguments):
    warnings.showwarning = lambda message, *_, **__: print(f"eval.py: warning: {message}", file=sys.stderr)
    {"answer": answer, "score": score, "prior": prior}[arguments.command](arguments)


def main(arguments) -> int:
    return guard("eval.py", run, arguments)


if __name__ == "__main__":
    sys.exit(main(ARGUMENTS))
