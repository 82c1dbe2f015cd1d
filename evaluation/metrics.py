"""What a score is: published metrics of report pairs, each named with its variant, and how sure it is.

A score of N pairs is kept as statistics of each, [N, k], which add up: so 1,000 resamples of the pairs cost sums only.
"""

import re
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

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


def flips(true: str, other: str) -> tuple[int, int]:
    """Of the words of direction (WORSE, BETTER) in a report, each once, how many flip in another one; how many it has.

    A word flips where the other report lacks it and has, in its stead, a word of the opposite direction that this one
    lacks.
    """
    before, after = words_of_change(true), words_of_change(other)
    gone, come = before - after, after - before
    flipped = len(gone & WORSE) * bool(come & BETTER) + len(gone & BETTER) * bool(come & WORSE)
    return flipped, len(before & (WORSE | BETTER))
