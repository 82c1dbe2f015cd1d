"""Scores of reports: which variant, how sure, with and without a prior image; and a page to read the reports on.

    python eval.py score --references questions.jsonl --predictions answers.jsonl --html page.html
"""

import sys

from cli import Parser, atomic, guard, print_table, progress

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


def parse(arguments=None):
    parser = Parser(prog="eval.py", description="Score written reports.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    score = add_score(commands)
    arguments = parser.parse_args(arguments)
    alone = ("model_name", "csv", "html", "export", "truth", "merge")
    if arguments.compare and (given := [name for name in alone if getattr(arguments, name)]):
        score.error(f"--{given[0].replace('_', '-')} goes with --predictions, not with --compare")
    if arguments.image_folder and not arguments.html:
        score.error("--image-folder is for the page: give --html as well")
    return arguments


def add_score(commands):
    score = commands.add_parser(
        "score",
        help="scores of an answer file, with intervals",
        description="Score an answer file, or compare two: overall, with and without a prior image, each score with a "
        f"95 % interval ({RESAMPLES:,} bootstrap resamples of the studies).",
    )
    add = score.add_argument
    add("--references", required=True, metavar="FILE",
        help="question file (JSONL): question_id, image, and reference, findings or impression")  # fmt: skip
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
import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import report
from phantom import DEVICES, FINDINGS, SIDED, level, read_report

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
        return f"{self.value:.2f}" + ("" if self.low is None else f" [{self.low:.2f}, {self.high:.2f}]")


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
    """A JSONL file's objects; ValueError that names the line."""
    records = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except ValueError as error:  # JSON or UTF-8
                raise ValueError(f"{path} line {number} is not JSON ({error}): give one object on each line") from None
            if not isinstance(record, dict) or not isinstance(record.get("question_id"), str | int):
                raise ValueError(f"{path} line {number} has no question_id: give one object with it on each line")
            records.append(record)
    if not records:
        raise ValueError(f"{path} is empty: give one JSON object on each line")
    return records


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


def read_pairs(references, predictions) -> list[Pair]:
    """Question file + answer file -> pairs in the questions' order.

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
        for name in FINDINGS | DEVICES:
            told, real = report.get(name, {}), name in there
            said = bool(told) and told["change"] not in ("resolved", "removed")
            for group in (name, "findings" if name in FINDINGS else "devices"):
                rows[f"{group} precision"][i] += said and real, said
                rows[f"{group} recall"][i] += said and real, real
                rows[f"{group} F1"][i] += 2 * (said and real), said + real
            if name in FINDINGS and said and real:
                rows["severity"][i] += told["level"] == level(there[name]["severity"]), 1
                rows["side"][i] += name in SIDED and told["side"] == there[name]["side"], name in SIDED
            if name in FINDINGS and name in truth["changes"]:
                rows["direction of change"][i] += told.get("change") == truth["changes"][name], 1
    return rows


# ------------------------------------------------------------------------------------------ command line


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
    {"score": score}[arguments.command](arguments)


def main(arguments) -> int:
    return guard("eval.py", run, arguments)


if __name__ == "__main__":
    sys.exit(main(ARGUMENTS))
