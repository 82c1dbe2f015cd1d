"""Clinical Contrastive Decoding: an expert that has seen the same image guides the report.

The expert is a classifier. Its findings, {"Cardiomegaly": 0.83, …}, act twice: as a sentence behind the question, and
as a push on the tokens that begin the findings' names. For the next token, whatever has been written so far,

    a, b     = log-softmax under the plain and the guided prompt                              [V]
    soft     = (1 - α) a + α b
    bias     = ln(p / (1 - p)) for a token of score p, not beyond ± ln γ; 0 for the others    [V]
    mixed    = (1 - β) W(soft) + β (soft + bias)

where W is the ban of repeated n-grams and, in sampling, temperature, top-k and top-p. Both prompts are rows of one
cache (`sample.prefill`), and every token is appended to both. α = β = 0 is plain decoding with the ban.

Source: Zhang et al., CCD, arXiv 2509.23379: soft is its symptom-grounded, the rest its expert-informed decoding. The
details are as published in ccd/ccd_utils.py of https://github.com/X-iZhang/CCD; docs/models.md lists the quirks.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch

from plumbing.fields import Range, Share, check_value, shorten
from plumbing.files import read_json
from tokenizer import IMAGE_TEXT, Tokenizer

VIEWS = ("Frontal", "Lateral")  # these labels tell the view, not a finding
NGRAM = 3  # no three tokens twice, where the options leave it to "auto"
IMAGE_ID = 0  # what the image counts as in the ban
DECAY = 0.95  # of a label's score from token to token

Gamma = Annotated[float, Range(1e-6, 1e6)]


@dataclass(frozen=True)
class Contrast:
    """The experts' scores of B studies, {label: probability} each, and how much they count.

    alpha: share of the guided prompt. beta: share of the pushed tokens. gamma: odds that no push exceeds; up to 1, none
    is cut. ValueError where a label, a probability or a share is not one.
    """

    scores: list[dict[str, float]]
    alpha: float = 0.5
    beta: float = 0.5
    gamma: float = 10.0

    def __post_init__(self):
        scores = check_value(self.scores, list[dict], "expert", "contrastive decoding")
        object.__setattr__(self, "scores", [check_scores(its_scores, "expert") for its_scores in scores])
        for name, hint in (("alpha", Share), ("beta", Share), ("gamma", Gamma)):
            check_value(getattr(self, name), hint, name, "contrastive decoding")

    def biases(self, tokenizer: Tokenizer, vocabulary: int, device) -> torch.Tensor:
        """What is added to the log-probability of each token [B, V], float32."""
        biases = torch.zeros(len(self.scores), vocabulary)
        for b, scores in enumerate(self.scores):
            for id, score in token_scores(scores, tokenizer).items():
                # the model may be unable to generate an added token
                if id < vocabulary:
                    biases[b, id] = log_odds(score, self.gamma)
        return biases.to(device)

    def soft(self, logits) -> torch.Tensor:
        """logits [2 * B, …, V], of the plain and the guided prompts in turn -> log-probabilities [B, …, V], mixed."""
        logits = logits.log_softmax(-1)
        plain, guided = logits[0::2], logits[1::2]
        return (1 - self.alpha) * plain + self.alpha * guided

    def mix(self, pushed, soft, ids=None) -> torch.Tensor:
        """soft + bias [..., V] and W(soft) -> scores. W(soft) is [..., V], or [..., k] of the ids [..., k] alone.

        What W has excluded (-inf) stays excluded, with beta = 1, too: 0 · -inf would be NaN.
        """
        if ids is not None:
            pushed = pushed.gather(-1, ids)
        mixed = (1 - self.beta) * soft + self.beta * pushed
        return mixed.masked_fill(soft == -math.inf, -math.inf)


# ------------------------------------------------------------------------------------------ the expert's scores


def read_scores(path) -> dict[str, float]:
    """Reads a JSON object {label: probability}; ValueError or OSError with one line."""
    try:
        return check_scores(read_json(Path(path)), path)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: give a JSON file {{label: probability}}") from None


def check_scores(scores, where) -> dict[str, float]:
    """Returns an expert's scores as Python floats; ValueError that names `where` and what is wrong."""
    scores = check_value(scores, dict, "the expert's scores", where)
    checked = {}
    for label, score in scores.items():
        if not isinstance(label, str) or not label.strip() or not label.isprintable() or IMAGE_TEXT in label:
            raise ValueError(f"{where}: {shorten(label)} is not a label: a label is a line of text, such as 'Edema'")
        # a scalar of NumPy or torch
        score = score.item() if hasattr(score, "item") else score
        checked[label] = check_value(score, Share, label, where)
    return checked


def guide(scores: dict[str, float]) -> str:
    """The sentence for what is likelier than not, in the order given.

        {"Edema": 0.7, "Fracture": 0.1, "Frontal": 0.9}
        "Attention to the following clinical instructions: Edema. View type: Frontal."

    Without a view the published sentence ends with a space, and without a finding it begins with one.
    """
    likely = [label for label, score in scores.items() if score >= 0.5]
    findings = [label for label in likely if label not in VIEWS]
    views = [label for label in likely if label in VIEWS]
    if not likely:
        return "No clinical guidance based on current findings."
    findings = f"Attention to the following clinical instructions: {'; '.join(findings)}." if findings else ""
    views = f"View type: {', '.join(views)}." if views else ""
    return f"{findings} {views}"


def guided_query(query: str, scores: dict[str, float]) -> str:
    """The question of the guided prompt."""
    return f"{query} {guide(scores)}"


def token_scores(scores: dict[str, float], tokenizer: Tokenizer) -> dict[int, float]:
    """The score of each token that begins a word of a label: p · 0.95^i for the i-th token of the label.

        "Lung Opacity"  ->  ▁   L     ung  ▁Op   acity     "▁" alone makes what follows begin a word
        kept            ->  p   .95p       .86p

    Of several scores of a token, the greatest counts.
    """
    result = {}
    for label, score in scores.items():
        for text in (label, label.lower()):
            ids = tokenizer.encode(text.replace("_", " "))
            if ids[:1] == [tokenizer.bos_token_id]:
                ids = ids[1:]
            begins = True
            for i, id in enumerate(ids):
                piece = tokenizer.backend.id_to_token(id)
                if begins or piece.startswith(("▁", "Ġ")):
                    result[id] = max(result.get(id, 0.0), score * DECAY**i)
                begins = piece in ("▁", "Ġ")
    return result


def log_odds(p: float, gamma: float) -> float:
    """ln(p / (1 - p)), within ± ln gamma if gamma is above 1."""
    p = min(max(p, 1e-6), 1 - 1e-6)
    bias = math.log(p / (1 - p))
    if gamma > 1:
        limit = math.log(gamma)
        bias = min(max(bias, -limit), limit)
    return bias
