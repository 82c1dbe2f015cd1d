"""Question file + answer file -> pairs of reference and prediction; what is exchanged with RadEval."""

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np

from data import REFERENCES, Question, Records, image_names, question_id, tell
from evaluation.metrics import VARIANTS, Groups, Table, statistics
from plumbing.cli import progress
from plumbing.fields import Range, check_value, printable
from plumbing.files import atomic, read_json


class Line(NamedTuple):
    """A line of a question or answer file, and where it is: a file and a line number."""

    raw: dict
    place: str


@dataclass(frozen=True)
class Pair:
    """A study's question, its reference and its prediction. images: as named in the question, current first."""

    id: str
    reference: str
    prediction: str
    prompt: str = ""
    images: tuple[str, ...] = ()
    model: str | None = None

    @property
    def has_prior(self) -> bool:
        """Whether there are two images. (`image_names` counts an image that is named twice as one.)"""
        return len(self.images) == 2


def read_pairs(references, predictions, chosen: Collection[str] | None = None) -> list[Pair]:
    """Returns the pairs in the order of the question file; chosen: the only ids that are wanted.

    The reference is the first of `data.REFERENCES` with a value; the prediction is the first of findings, impression,
    text, as published. ValueError, with counts, if an id is missing, comes twice, or is in the answers alone. Questions
    that `eval.py answer` leaves out are left out here, too.
    """
    questions, answers = read_lines(references, leaves_out=True), read_lines(predictions)
    if chosen is not None:
        unknown = set(chosen) - questions.keys()
        if unknown:
            first = printable(min(unknown), 60)
            raise ValueError(f"{references} has no question {first} ({len(unknown):,} such ids in all)")
        # an answer to a question that is not chosen is no mistake
        ignored = questions.keys() - set(chosen)
        questions = {id: question for id, question in questions.items() if id not in ignored}
        answers = {id: answer for id, answer in answers.items() if id not in ignored}
    # an odd question is not asked
    unasked = [id for id in questions if id not in answers and is_odd(questions[id].raw)]
    if unasked:
        tell(f"{references}: {len(unasked):,} odd questions without an answer are left out; the first: {unasked[0]}")
        questions = {id: question for id, question in questions.items() if id not in unasked}
    # every question has one answer, every answer a question
    require_none([id for id in questions if id not in answers], f"of {references} are missing in {predictions}")
    require_none([id for id in answers if id not in questions], f"of {predictions} are not in {references}")

    pairs = []
    for id, question in questions.items():
        answer = answers[id]
        reference = text_of(question, REFERENCES)
        # a question's text is its prompt
        if is_question(answer.raw):
            raise ValueError(f"{answer.place} is a question, not an answer: give the file that eval.py answer wrote")
        prediction = text_of(answer, ("findings", "impression", "text"))
        try:
            images = tuple(image_names(question.raw))
        except ValueError as error:
            raise ValueError(f"{question.place}: {error}") from None
        prompt = check_value(question.raw.get("text"), str | None, "text", question.place)
        model = check_value(answer.raw.get("model_id"), str | None, "model_id", answer.place)
        pairs.append(Pair(id, reference, prediction, prompt or "", images=images, model=model))
    # a question file without images; no model says of every study what it was asked
    if all(pair.prompt and pair.prediction == pair.prompt and pair.model is None for pair in pairs):
        raise ValueError(f"{predictions} repeats the texts of the questions: give the file that eval.py answer wrote")
    empty = count_empty(pairs)
    if any(empty.values()):
        counts = ", ".join(f"{count:,} {kind}" for kind, count in empty.items())
        tell(f"{predictions}: of {len(pairs):,} studies {counts} are empty; they are scored as they are")
    return pairs


def count_empty(pairs: list[Pair]) -> dict[str, int]:
    """How many texts have no letter or digit: an empty answer is a report that was not written."""
    is_empty = lambda text: not any(map(str.isalnum, text))
    answers = sum(is_empty(pair.prediction) for pair in pairs)
    return {"answers": answers, "references": sum(is_empty(pair.reference) for pair in pairs)}


def count_empty_by_group(pairs: list[Pair], groups: Groups) -> dict[str, dict[str, int]]:
    """`count_empty` of each group of studies."""
    members = {name: [pairs[i] for i in np.flatnonzero(rows)] for name, rows in groups.items()}
    return {name: count_empty(some) for name, some in members.items()}


def require_none(ids: list[str], problem: str):
    if ids:
        raise ValueError(f"questions and answers do not match: {len(ids):,} ids {problem} (first: {ids[0]})")


def text_of(line: Line, names: tuple[str, ...]) -> str:
    """The text in the first of these fields that the line has."""
    for name in names:
        if line.raw.get(name) is not None:
            return check_value(line.raw[name], str, name, line.place)
    raise ValueError(f"{line.place}: there is no text in {', '.join(names)}: add its report")


def is_question(raw: dict) -> bool:
    """Whether a line has what a question has, and nothing that `eval.py answer` writes beside it."""
    return "image" in raw and "text" in raw and "prompt" not in raw and "model_id" not in raw


def is_odd(question: dict) -> bool:
    try:
        Question.parse(question)
    except ValueError:
        return True
    return False


def read_lines(path, leaves_out: bool = False) -> dict[str, Line]:
    """{question_id: line} of a question or answer file, a training record as a question.

    leaves_out: an odd line, or one whose id was there already, is left out and counted; else ValueError names it.
    """
    records, lines, odd, repeated = Records(path), {}, [], []
    for number in range(len(records)):
        try:
            line = records[number]
            # a training record asks its first question
            if "conversations" in line:
                question = Question.parse(line)
                line = {"question_id": question.id, "image": question.images, "text": question.text}
                line["reference"] = question.reference
            # ids are compared as text: 7 and "7" are the same
            id = str(question_id(line))
        except ValueError as error:
            place = f"{records.place(number)} "
            odd.append(place + str(error).removeprefix(place))
            continue
        if id in lines:
            repeated.append(id)
        lines.setdefault(id, Line(line, records.place(number)))
    if not leaves_out and odd:
        raise ValueError(odd[0])
    if not lines:
        raise ValueError(odd[0] if odd else f"{path} is empty: give one JSON object on each line")
    if not leaves_out:
        require_none(list(dict.fromkeys(repeated)), f"come twice in {path}")
    if odd or repeated:
        counts = f"{len(odd):,} odd lines and {len(repeated):,} with an earlier one's id"
        first = odd[0] if odd else f"id {repeated[0]}"
        tell(f"{path}: {counts} are left out; the first: {first}")
    return lines


def groups_of(pairs: list[Pair]) -> Groups:
    """{"all", "with prior", "without prior"} -> bool [N]; only "all" if no question names images."""
    groups = {"all": np.ones(len(pairs), bool)}
    if any(pair.images for pair in pairs):
        prior = np.array([pair.has_prior for pair in pairs])
        groups |= {"with prior": prior, "without prior": ~prior}
    return {name: members for name, members in groups.items() if members.any()}


def sizes_of(groups: Groups) -> dict[str, int]:
    return {group: int(members.sum()) for group, members in groups.items()}


def statistics_of(pairs: list[Pair], bertscore: bool = False, label: str = "scoring") -> Table:
    """The rows of all metrics, see `metrics.statistics`."""
    predictions, references = [pair.prediction for pair in pairs], [pair.reference for pair in pairs]
    return statistics(predictions, references, bertscore, progress(label))


EXPORT_START = '{\n "question_id": ['


def write_export(path, pairs: list[Pair]):
    """Writes what RadEval takes: aligned lists of the texts as they are; the ids are for the reader."""
    lists = {
        "question_id": [pair.id for pair in pairs],
        "references": [pair.reference for pair in pairs],
        "hypotheses": [pair.prediction for pair in pairs],
    }
    with atomic(path) as file:
        json.dump(lists, file, ensure_ascii=False, indent=1)


def read_merge(paths, count: int) -> tuple[Table, dict[str, float]]:
    """RadEval's results for `count` pairs -> ({key: [N, 1]} of values per study, {key: value} of single ones)."""
    columns, values = {}, {}
    for path in paths:
        for key, value in read_json(Path(path)).items():
            name = printable(key, 60)
            if key in VARIANTS or key in columns or key in values:
                raise ValueError(f"{path}: there is a score {name} already: rename it or leave the file out")
            # a number for all pairs, or a list of one for each
            value = check_value(value, float | Annotated[list[float], Range(count, count)], name, path)
            if isinstance(value, list):
                columns[key] = np.array(value)[:, None]  # [N, 1]
            else:
                values[key] = value
    return columns, values
