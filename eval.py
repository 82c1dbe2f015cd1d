"""Answers to a question file; scores of them, which variant, how sure, with and without a prior; what the prior does.

    python eval.py answer --model ID_OR_DIR --questions questions.jsonl --image-folder images --answers answers.jsonl
    python eval.py score --references questions.jsonl --predictions answers.jsonl --html page.html
    python eval.py prior --model ID_OR_DIR --questions questions.jsonl --image-folder images --out priors
"""

import argparse
import sys

from plumbing.cli import Parser, add_decoding_flags, add_model_flags, guard, print_table, progress
from plumbing.files import atomic

CONDITIONS = {  # --prior: what the model sees beside the current image
    "true": "the patient's prior",
    "dummy": "the current image again",
    "shuffled": "another patient's prior",
    "reversed": "current and prior swapped",
    "blank": "a black image",
}


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
    add("--batch-size", type=int, metavar="N", help="studies decoded together; without it what fits, up to 16")
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
        "95 % interval (1,000 bootstrap resamples of the studies).",
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
import functools
import json
import math
import textwrap
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data import ImageFolder, Question, Records, image_names
from evaluation import page as report
from evaluation.answering import Asked, choose, load_model, shuffle_priors, write_answers
from evaluation.metrics import (
    BETTER,
    FLOOR,
    METRICS,
    VARIANTS,
    WORDS_OF_CHANGE,
    WORSE,
    Interval,
    differences,
    flips,
    intervals,
    published,
    score_of,
    statistics,
    temporal_f1_score,
)
from evaluation.truth import severity_flips, truth_statistics
from plumbing.distributed import init_distributed

__all__ = ["evaluate_report", "temporal_f1_score"]  # what others import, beside the command line


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
        """Of two names, for `image_names` takes the same one twice (the published stand-in for a prior) as one."""
        return len(self.images) == 2


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
    try:
        return tuple(image_names(record))
    except ValueError as error:
        raise ValueError(f"{path}: {record['question_id']}: {error}") from None


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


# ------------------------------------------------------------------------------------------ what a prior does

CHANGED, FLIPPED, TURNED = "reports changed", "directions flipped", "severity changes turned round"


def prior_scores(texts: dict[str, list[str]], references: list[str], truths: list[dict] | None, seed: int) -> dict:
    """{score: {condition: (its Interval, the Interval of its difference to "true", if it has one)}}.

    texts: {condition: [N]}, "true" first; references: [N]. All intervals are over the same resamples of the N studies.
    Beside the scores stand, of the other conditions, the share of reports that differ from those under "true" and the
    share of words of direction that flip (`flips`); with truths, the share of changed severities whose telling turns
    round (`severity_flips`).
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
            if truths:
                both = zip(pairs, truths, strict=True)
                table[TURNED] = np.array([severity_flips(*pair, truth) for pair, truth in both], dtype=float)
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
    with init_distributed() as world:
        load = functools.cache(lambda: load_model(arguments, world))
        for condition, path in files.items():
            if arguments.model:
                out.mkdir(parents=True, exist_ok=True)
                write_answers(arguments, ask(arguments, records, rows, condition), path, load, world)
    if world.rank:
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
    with init_distributed() as world:
        asked = ask(arguments, records, rows, arguments.prior)
        load = lambda: load_model(arguments, world)
        write_answers(arguments, asked, Path(arguments.answers), load, world)


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
    {"answer": answer, "score": score, "prior": prior}[arguments.command](arguments)


def main(arguments) -> int:
    return guard("eval.py", run, arguments)


if __name__ == "__main__":
    sys.exit(main(ARGUMENTS))
