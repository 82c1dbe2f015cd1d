"""The published metrics of report pairs, each named with its variant, and bootstrap intervals of them.

A score of N pairs is kept as one row of numbers for each pair, [N, k], whose sum over the pairs gives the score:

    k = 1       the pair's own score × 100                       the score is their mean
    k = 2       hits, chances                                    the score is 100 · hits / chances
    k = 2n + 2  n-gram counts of BLEU-n (`bleu_rows`)            the score is the corpus BLEU

So a bootstrap resample of the pairs is a weighted sum of rows, and 1,000 resamples tokenize nothing again.
"""

import re
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Table = dict[str, np.ndarray]  # {score: rows [N, k]}
Groups = dict[str, np.ndarray]  # {name of a group of pairs: bool [N]}
RESAMPLES = 1000  # of the bootstrap
ORDERS = (1, 2, 3, 4)  # the n of BLEU-n

METRICS = {  # the published keys, in the published order -> what each one is, × 100
    **{
        f"BLEU{n}": f"corpus BLEU, n-grams up to {n}, mteval-13a tokens, one reference, no smoothing; not a mean over "
        "reports, not COCO's tokens"
        for n in ORDERS
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


def clean(text: str) -> str:
    """Clean a text as published: breaks, dashes and underscores become blanks; of all signs only . , : ; ( ) stay."""
    text = re.sub(r"[\n_-]+", " ", text)
    text = re.sub(r"[^\w\s.,:;()]", "", text)
    return re.sub(r"\s{2,}", " ", text).strip()


def words(text: str) -> list[str]:
    """The tokens of ROUGE: runs of a-z and 0-9, nothing else."""
    return re.findall(r"[a-z0-9]+", text.lower())


def words_of_change(text: str) -> set[str]:
    return WORDS_OF_CHANGE.intersection(re.findall(r"\w+", clean(text).lower()))


def tokens_13a(text: str) -> list[str]:
    """The tokens of NIST's mteval-v13a.pl, as sacrebleu has them: signs apart, but . and , inside numbers stay."""
    # words that a line break has parted become whole, entities become signs
    text = text.replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    text = text.replace("&quot;", '"').replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">")
    # every ASCII sign but ' , - . is a token
    text = re.sub(r"[!-&(-+/:-@\[-`{-~]", r" \g<0> ", f" {text} ")
    # . and , are, unless a digit stands on both sides; - is behind a digit
    text = re.sub(r"([^0-9])([.,])", r"\1 \2 ", text)
    text = re.sub(r"([.,])([^0-9])", r" \1 \2", text)
    return re.sub(r"([0-9])-", r"\1 - ", text).split()


def bleu_rows(prediction: str, reference: str) -> list[list[int]]:
    """The rows of BLEU-1 to BLEU-4; that of BLEU-n has 2n + 2 numbers.

    Matched n-grams for 1 … n, n-grams of the prediction for 1 … n, tokens of the prediction, tokens of the reference.
    """
    predicted, wanted = tokens_13a(prediction), tokens_13a(reference)
    matched, total, rows = [], [], []
    for n in ORDERS:
        ours, theirs = ngrams(predicted, n), ngrams(wanted, n)
        # an n-gram matches at most as often as the reference has it
        matched.append((ours & theirs).total())
        total.append(ours.total())
        rows.append([*matched, *total, len(predicted), len(wanted)])
    return rows


def ngrams(tokens: list[str], n: int) -> Counter:
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def rouge_l(prediction: str, reference: str) -> float:
    """F1 of the longest common subsequence (LCS) of the words of two texts, in [0, 1].

        reference           a b c d
        after "b"         0 0 1 1 1    the LCS with the first 0 to 4 words of the reference
        after "b d"       0 0 1 1 2
    """
    predicted, wanted = words(prediction), words(reference)
    row = [0] * (len(wanted) + 1)
    for word in predicted:
        above, row = row, [0]
        for i, other in enumerate(wanted):
            if word == other:
                row.append(above[i] + 1)
            else:
                row.append(max(above[i + 1], row[i]))
    return 2 * row[-1] / max(1, len(predicted) + len(wanted))


def temporal_f1(predicted: set[str], wanted: set[str]) -> float:
    """F1 of two sets of words with the published epsilons: 1 if both are empty, 1e-10 if only `wanted` is."""
    # without them the published code would divide by zero
    tiny = 1e-10
    if not wanted:
        return tiny if predicted else 1.0
    common = len(predicted & wanted)
    precision = (common + tiny) / (len(predicted) + tiny)
    recall = (common + tiny) / (len(wanted) + tiny)
    return 2 * precision * recall / (precision + recall + tiny)


def temporal_f1_score(predictions: list[str], references: list) -> dict:
    """The published temporal score: {"f1": mean F1, "prediction_entities", "reference_entities": a set for each pair}.

    A reference is a text, or a list of texts whose words are united. ValueError unless each prediction has one.
    """
    if not predictions or len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions and {len(references)} references: give as many of each")
    texts = [text if isinstance(text, str) else "\n".join(text) for text in references]
    predicted, wanted = list(map(words_of_change, predictions)), list(map(words_of_change, texts))
    f1 = sum(map(temporal_f1, predicted, wanted)) / len(predicted)
    return {"f1": f1, "prediction_entities": predicted, "reference_entities": wanted}


def meteor_scorer() -> Callable[[str, str], float]:
    """Returns METEOR as a function (prediction, reference) -> score in [0, 1]. ValueError says what to install."""
    try:
        from nltk import word_tokenize
        from nltk.corpus import wordnet
        from nltk.translate.meteor_score import single_meteor_score

        # both load their data on first use: find out now whether it is there
        wordnet.ensure_loaded()
        word_tokenize("")
    except (ImportError, LookupError):
        install = "pip install nltk; python -m nltk.downloader wordnet punkt_tab"
        raise ValueError(f"METEOR needs NLTK and its data: {install}") from None
    return lambda prediction, reference: single_meteor_score(word_tokenize(reference), word_tokenize(prediction))


def bertscore(predictions: list[str], references: list[str]) -> list[float]:
    """BERTScore's F1 of each pair, in about [0, 1]; 0 if a text is empty. ValueError says what to install."""
    model, f1 = "distilbert-base-uncased", np.zeros(len(predictions))
    # with transformers 5 the package fails on empty texts
    full = [i for i in range(len(predictions)) if predictions[i] and references[i]]
    try:
        from bert_score import score

        if full:
            pairs = [[texts[i] for i in full] for texts in (predictions, references)]
            *_, f1[full] = score(*pairs, model_type=model)  # precision, recall, F1
    except ImportError:
        raise ValueError("BERTScore needs a package: pip install bert-score") from None
    except OSError:
        raise ValueError(f"BERTScore needs the model {model}: download it once into the hub's cache") from None
    return f1.tolist()


def statistics(
    predictions: list[str], references: list[str], with_bertscore: bool = False, show=lambda done, total: None
) -> Table:
    """Returns {key: [N, k]}, the rows that `score_of` turns into scores. show(done, N) is called after each pair.

    The texts are lowered and cleaned first, as published. Without NLTK or its data METEOR is left out, with a warning.
    """
    predictions = [clean(text.lower()) for text in predictions]
    references = [clean(text.lower()) for text in references]
    # what may be missing is looked for before the long work begins
    rows = {key: [] for key in VARIANTS}
    if with_bertscore:
        rows["Bert_score"] = [100 * value for value in bertscore(predictions, references)]
    meteor = None
    try:
        meteor = meteor_scorer()
    except ValueError as error:
        warnings.warn(f"METEOR is left out. {error}", stacklevel=2)

    for prediction, reference in zip(predictions, references, strict=True):
        for n, row in zip(ORDERS, bleu_rows(prediction, reference), strict=True):
            rows[f"BLEU{n}"].append(row)
        if meteor:
            rows["METEOR"].append(100 * meteor(prediction, reference))
        rows["ROUGE-L"].append(100 * rouge_l(prediction, reference))
        wanted = words_of_change(reference)
        rows["Temporal_entity_score"].append(100 * temporal_f1(words_of_change(prediction), wanted))
        rows[FLOOR].append(0 if wanted else 100)
        show(len(rows[FLOOR]), len(predictions))

    # a score that was not computed has no rows; a single number is a row of width 1
    table = {}
    for key, column in rows.items():
        if column:
            table[key] = np.array(column, dtype=float).reshape(len(column), -1)  # [N, k]
    return table


def score_of(sums: np.ndarray, count) -> np.ndarray:
    """Sums [..., k] of the rows of `count` pairs -> the score [...]. The width k says how: see the top of this file.

    NaN for hits without a chance.
    """
    width = sums.shape[-1]
    if width == 1:
        return sums[..., 0] / count
    if width == 2:
        with np.errstate(invalid="ignore"):
            return 100 * sums[..., 0] / sums[..., 1]
    return corpus_bleu(sums)


def corpus_bleu(sums: np.ndarray) -> np.ndarray:
    """Sums [..., 2n + 2] of `bleu_rows` -> BLEU-n × 100 [...]; 0 if an order has no match."""
    order = sums.shape[-1] // 2 - 1
    matched, total = sums[..., :order], sums[..., order : 2 * order]
    predicted, wanted = sums[..., -2], sums[..., -1]
    with np.errstate(divide="ignore", invalid="ignore"):
        # the geometric mean of the precisions, times a penalty if the predictions are shorter than the references
        log_precision = np.log(matched / total).mean(-1)
        log_penalty = np.minimum(0, 1 - wanted / predicted)
        bleu = 100 * np.exp(log_precision + log_penalty)
    return np.where((matched > 0).all(-1), bleu, 0.0)


def corpus_score(column: np.ndarray) -> float:
    """The score of all N pairs from their rows [N, k]."""
    return float(score_of(column.sum(0), len(column)))


def published(scores: dict[str, float]) -> dict[str, float]:
    """The scores that the published code prints: its keys in its order, two digits."""
    return {key: round(float(scores[key]), 2) for key in METRICS if key in scores}


@dataclass(frozen=True)
class Interval:
    """A value and its 95 % interval (percentiles of the bootstrap); without a bootstrap low and high are None."""

    value: float
    low: float | None = None
    high: float | None = None

    def __str__(self):
        return self.format()

    def format(self, sign: str = "") -> str:
        """"60.12 [58.90, 61.30]", or "60.12" without an interval. sign="+" gives every number its sign."""
        numbers = [number for number in (self.value, self.low, self.high) if number is not None]
        # adding 0.0 turns -0.0 into 0.0
        value, *ends = [f"{round(number, 2) + 0.0:{sign}.2f}" for number in numbers]
        return f"{value} [{', '.join(ends)}]" if ends else value


def resample(table: Table, seed: int) -> dict[str, np.ndarray]:
    """{key: [N, k]} -> {key: [RESAMPLES]}: every score on the same resamples of the N pairs, drawn by the seed."""
    columns = np.concatenate(list(table.values()), axis=1)  # [N, sum of all k]
    count, generator = len(columns), np.random.default_rng(seed)
    sums = []
    for _ in range(RESAMPLES):
        drawn = generator.integers(count, size=count)
        # how often each pair was drawn
        times = np.bincount(drawn, minlength=count)
        sums.append(times @ columns)

    # cut the columns into scores again
    ends = np.cumsum([column.shape[1] for column in table.values()])
    parts = np.split(np.stack(sums), ends[:-1], axis=1)  # a list of [RESAMPLES, k]
    return {key: score_of(part, count) for key, part in zip(table, parts, strict=True)}


def percentiles(resampled: np.ndarray) -> list[float]:
    return np.nanpercentile(resampled, [2.5, 97.5]).tolist()


def intervals(table: Table, groups: Groups, seed: int = 0) -> dict[str, dict[str, Interval]]:
    """{key: [N, k]} -> {key: {group: Interval}}. A group without a chance is left out."""
    result = {key: {} for key in table}
    for group, members in groups.items():
        part = {key: column[members] for key, column in table.items()}
        for key, resampled in resample(part, seed).items():
            value = corpus_score(part[key])
            if not np.isnan(value):
                result[key][group] = Interval(value, *percentiles(resampled))
    return result


def differences(a: Table, b: Table, groups: Groups, seed: int = 0) -> dict[str, dict[str, dict]]:
    """Tables of A and B, the same N studies -> {key: {group: {"a", "b": score, "difference": Interval of B - A}}}."""
    result = {key: {} for key in a if key in b and key != FLOOR}
    for group, members in groups.items():
        # one table of both, so that both are resampled together
        both = {}
        for key in result:
            both[key, "a"] = a[key][members]
            both[key, "b"] = b[key][members]
        resampled = resample(both, seed)
        for key in result:
            score_a, score_b = corpus_score(both[key, "a"]), corpus_score(both[key, "b"])
            ends = percentiles(resampled[key, "b"] - resampled[key, "a"])
            result[key][group] = {"a": score_a, "b": score_b, "difference": Interval(score_b - score_a, *ends)}
    return result
