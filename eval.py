"""Answer a question file, score the answers, and find out what a model does with the prior image.

    python eval.py answer --model ID_OR_DIR --questions questions.jsonl --image-folder images --answers answers.jsonl
    python eval.py merge --questions questions.jsonl --answers answers.jsonl part1.jsonl part2.jsonl
    python eval.py score --references questions.jsonl --predictions answers.jsonl --html page.html
    python eval.py prior --model ID_OR_DIR --questions questions.jsonl --image-folder images --out priors
"""

if __name__ == "__main__":
    import plumbing.start  # noqa: F401 (first of all)


import argparse
import functools
import re
import sys
import warnings
from pathlib import Path

from data import ImageFolder
from evaluation import answering, merging, metrics, page, tables
from evaluation.answering import CONDITIONS, QuestionSet, choose, load_model, read_questions, write_answers
from evaluation.metrics import FLOOR, METRICS, VARIANTS, Interval, published, temporal_f1_score
from evaluation.pairs import (
    EXPORT_START,
    Pair,
    count_empty,
    count_empty_by_group,
    groups_of,
    read_merge,
    read_pairs,
    sizes_of,
    statistics_of,
    write_export,
)
from evaluation.prior import prior_scores
from evaluation.truth import read_truth, truth_statistics
from plumbing.cli import Parser, add_decoding_flags, add_expert_flags, add_model_flags, guard
from plumbing.distributed import init_distributed

__all__ = ["evaluate_report", "temporal_f1_score"]  # what others import, beside the command line


def evaluate_report(references, predictions, bertscore: bool = False) -> dict[str, float]:
    """Question file + answer file -> the published scores {"BLEU1": …, "Temporal_entity_score": …}, × 100, two digits.

    Differs from the published function: pairs are joined by question_id, ROUGE-L is the plain mean, Bert_score comes
    only if asked for, and METEOR is left out, with a warning, without NLTK.
    """
    table = statistics_of(read_pairs(references, predictions), bertscore)
    return published({key: metrics.corpus_score(rows) for key, rows in table.items()})


def answer(arguments):
    tables.check_distinct(written(arguments.answers), [arguments.questions, arguments.ids, arguments.expert])
    questions = read_questions(arguments.questions)
    chosen = choose(questions, arguments)
    with init_distributed() as world:
        asked = QuestionSet(arguments, questions, chosen, arguments.prior)
        write_answers(arguments, asked, Path(arguments.answers), lambda: load_model(arguments, world), world)


def merge(arguments):
    parts = list(map(Path, arguments.parts))
    read = [arguments.questions, *parts, *map(answering.sidecar_of, parts)]
    tables.check_distinct(written(arguments.answers), read)
    merging.merge(arguments.questions, Path(arguments.answers), parts)


def written(answers) -> list:
    """An answer file and its settings."""
    return [answers, answering.sidecar_of(Path(answers))]


def score(arguments):
    if arguments.image_folder and not arguments.html:
        raise ValueError("--image-folder is for the page: give --html as well")
    if arguments.compare:
        return compare(arguments)

    # 1) what would be lost: a file that is read, or is no page or export
    read = [arguments.references, arguments.predictions, arguments.ids, arguments.truth, *arguments.merge]
    tables.check_distinct([arguments.csv, arguments.html, arguments.export], read)
    if arguments.html:
        tables.check_replaceable(arguments.html, page.START, "HTML page")
    if arguments.export:
        tables.check_replaceable(arguments.export, EXPORT_START, "file of --export")
    if arguments.image_folder:
        ImageFolder(arguments.image_folder, None)

    # 2) pairs, and the scores of them that RadEval and the phantom hospital's truth give
    ids = answering.read_ids(arguments.ids) if arguments.ids is not None else None
    pairs = read_pairs(arguments.references, arguments.predictions, ids)
    if arguments.export:
        write_export(arguments.export, pairs)
    columns, values = read_merge(arguments.merge, len(pairs))
    notes = VARIANTS | dict.fromkeys((*columns, *values), "as RadEval gave it")
    if arguments.truth:
        truths = read_truth(arguments.truth, pairs)
        columns |= truth_statistics([pair.prediction for pair in pairs], truths)

    if arguments.csv:
        tables.read_csv(arguments.csv, ["Model Name", *METRICS, *columns, *values])

    # 3) scores and their intervals; RadEval's single values have none
    table = statistics_of(pairs, arguments.bertscore) | columns
    groups = groups_of(pairs)
    scores = metrics.intervals(table, groups, arguments.seed)
    scores |= {key: {"all": Interval(value)} for key, value in values.items()}
    overall = {key: cells["all"].value for key, cells in scores.items() if cells}
    name = arguments.model_name or pairs[0].model or Path(arguments.predictions).stem

    # 4) a row of a CSV file: the published columns, then the others
    if arguments.csv:
        row = {"Model Name": name} | dict.fromkeys(METRICS, "") | published(overall)
        for key in (*columns, *values):
            row[key] = round(overall[key], 4) if key in overall else ""
        tables.append_csv(arguments.csv, row)

    # 5) a page
    sizes, empty = sizes_of(groups), count_empty_by_group(pairs, groups)
    if arguments.html:
        subtitle = f"{Path(arguments.predictions).name} against {Path(arguments.references).name}"
        if any(empty["all"].values()):
            subtitle += f"; empty: {tables.describe_empty(empty)}"
        page.write(arguments.html, title=name, subtitle=subtitle, groups=sizes, scores=scores, notes=notes,
                   pairs=pairs, table=table, folder=arguments.image_folder)  # fmt: skip

    # 6) an object or a table on stdout
    if arguments.json:
        variants = {key: VARIANTS[key] for key in scores if key in VARIANTS}
        result = {"model": name, "studies": sizes, "published": published(overall), "scores": scores}
        return tables.print_json(result | {"variants": variants, "empty": empty["all"], "empty_by_group": empty})
    print(f"{name}: mean or corpus score × 100 [95 % interval]")
    tables.print_scores(scores, {group: f"{group} ({size:,})" for group, size in sizes.items()})
    print(f"empty: {tables.describe_empty(empty)}")
    print(f"{FLOOR}: {VARIANTS[FLOOR]}")


def compare(arguments):
    for name in ("model_name", "csv", "html", "export", "truth", "merge"):
        if getattr(arguments, name):
            raise ValueError(f"--{name.replace('_', '-')} goes with --predictions, not with --compare")
    ids = answering.read_ids(arguments.ids) if arguments.ids is not None else None
    a, b = (read_pairs(arguments.references, path, ids) for path in arguments.compare)
    groups = groups_of(a)
    rows_a, rows_b = (statistics_of(pairs, arguments.bertscore) for pairs in (a, b))
    scores = metrics.differences(rows_a, rows_b, groups, arguments.seed)
    names, sizes = dict(zip("ab", arguments.compare, strict=True)), sizes_of(groups)
    empty = {name: count_empty_by_group(pairs, groups) for name, pairs in (("a", a), ("b", b))}
    if arguments.json:
        return tables.print_json(names | {"studies": sizes, "scores": scores, "empty_by_group": empty})
    print(f"A: {names['a']}\nB: {names['b']}")
    tables.print_differences(scores, sizes)
    print(f"\nempty in A: {tables.describe_empty(empty['a'])}\nempty in B: {tables.describe_empty(empty['b'])}")


def prior(arguments):
    # 1) mistakes show before the first question is answered
    questions, out = read_questions(arguments.questions), Path(arguments.out)
    chosen = choose(questions, arguments, only_with_prior=True)
    files = {condition: out / f"{condition}.jsonl" for condition in arguments.conditions}
    tables.check_distinct([*files.values(), arguments.csv], [arguments.questions, arguments.ids, arguments.truth])
    if arguments.csv:
        tables.read_csv(arguments.csv, tables.PRIOR_COLUMNS)
    for question in chosen:
        if question.reference is None:
            raise ValueError(f"{arguments.questions}: question {question.id} has no reference to score answers with")
    # a pair without texts knows its id and its images
    studies = [Pair(str(question.id), "", "", images=tuple(question.images)) for question in chosen]
    truths = read_truth(arguments.truth, studies) if arguments.truth else None
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"{out} is a file: give a folder as --out")
    warn_of_comparison(chosen)

    # 2) one answer file for each condition; without --model they are there already
    if arguments.model:
        if not arguments.image_folder:
            raise ValueError("--model needs --image-folder, to answer the questions")
        sets = {condition: QuestionSet(arguments, questions, chosen, condition) for condition in files}
        with init_distributed() as world:
            for condition, path in files.items():
                answering.check_before(arguments, sets[condition], path)
            out.mkdir(parents=True, exist_ok=True)
            # the model is loaded once, and only if there is something to answer
            load = functools.cache(lambda: load_model(arguments, world))
            for condition, path in files.items():
                write_answers(arguments, sets[condition], path, load, world)
        if world.rank:
            return

    # 3) scores under each condition, over the same studies
    ids = [str(question.id) for question in chosen]
    pairs = {condition: read_pairs(arguments.questions, path, ids) for condition, path in files.items()}
    scores = prior_scores(pairs, truths, arguments.seed)

    # 4) a CSV file, and stdout
    name = arguments.model or pairs["true"][0].model or out.name
    if arguments.csv:
        tables.write_prior_csv(arguments.csv, name, scores)
    empty = {condition: count_empty(answered) for condition, answered in pairs.items()}
    if arguments.json:
        return tables.print_json({"model": name, "studies": len(ids), "scores": scores, "empty": empty})
    print(f"{name}, {len(ids):,} studies with a prior: score × 100 [95 % interval], and its paired difference to true")
    tables.print_scores(scores, dict(zip(files, files, strict=True)))
    print(f"empty: {tables.describe_empty(empty)}")
    tables.print_prior_notes(files)


def warn_of_comparison(questions: list):
    """Warns of questions whose clinical context says that there is a prior image; "None." says that there is none."""
    telling = [question for question in questions if re.search(r"\bComparison: (?!none)", question.text, re.I)]
    if telling:
        some = f"{len(telling):,} of {len(questions):,} questions repeat what the report says under Comparison"
        warnings.warn(f"{some}, so a model can know of a prior without seeing one: see docs/scores.md", stacklevel=3)


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return int(text)


def part(text: str) -> answering.Part:
    try:
        return answering.Part.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(error) from None


def conditions(text: str) -> list[str]:
    # the others are compared with the true prior, which comes first
    names = list(dict.fromkeys(["true", *text.split(",")]))
    for name in names:
        if name not in CONDITIONS:
            raise argparse.ArgumentTypeError(f"{name} is none of {', '.join(CONDITIONS)}")
    return names


def parse(arguments=None):
    parser = Parser(prog="eval.py", description="Answer a question file, score answers, find out what a prior does.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    defaults = {"formatter_class": argparse.ArgumentDefaultsHelpFormatter}
    answer = commands.add_parser("answer", help="answer a question file; a killed run resumes", **defaults)
    merge = commands.add_parser("merge", help="merge the answer files of all parts into that of the whole", **defaults)
    score = commands.add_parser("score", help="score an answer file, or compare two, with 95 %% bootstrap intervals")
    prior = commands.add_parser("prior", help="compare answers under several priors", **defaults)

    add = answer.add_argument
    add("--model", required=True, metavar="ID_OR_DIR", help="checkpoint: a folder or a hub id")
    add("--image-folder", required=True, metavar="DIR", help="where the questions' image paths begin")
    add("--answers", required=True, metavar="FILE", help="answer file to write (JSONL), in the questions' order")
    shown = "; ".join(f"{name}: {image}" for name, image in CONDITIONS.items())
    add("--prior", default="true", choices=CONDITIONS, help=f"what the model sees as the prior; {shown}")
    add_expert_flags(add, 'JSONL {"question_id": …, label: probability, …}')
    add("--part", type=part, metavar="K/N", help="answer the K-th of N parts only; merge makes one file of them")
    add("--num-return-sequences", type=int, default=1, metavar="R", help="best beams, or samples, as texts beside text")

    add = merge.add_argument
    add("--questions", required=True, metavar="FILE", help="the question file that was answered")
    add("--answers", required=True, metavar="FILE", help="answer file to write, as one run writes it")
    add("parts", nargs="+", metavar="PART", help="the answer file of each part, in any order")

    add = score.add_argument
    add("--references", required=True, metavar="FILE", help="question file with the true reports")
    either = score.add_mutually_exclusive_group(required=True)
    either.add_argument("--predictions", metavar="FILE", help="answer file (JSONL): question_id and text")
    either.add_argument("--compare", nargs=2, metavar=("A", "B"), help="two answer files: differences B - A, paired")
    add("--ids", metavar="IDS", help="score these question ids only: a file, or a list with commas")
    add("--model-name", metavar="NAME", help="name in table, CSV and page; without it the answers' model_id")
    add("--bertscore", action="store_true", help="BERTScore too (needs bert-score and its model)")
    add("--seed", type=int, default=0, metavar="S", help="seed of the bootstrap (default: 0)")
    add("--html", metavar="FILE", help="write one page: scores, and every study beside its reference")
    add("--image-folder", metavar="DIR", help="where the images are; without it the page has none")
    add("--export", metavar="FILE", help="write references and hypotheses as the lists that RadEval takes (JSON)")
    add("--merge", nargs="+", default=[], metavar="FILE", help="add the scores that RadEval gave for the export (JSON)")

    add = prior.add_argument
    add("--model", metavar="ID_OR_DIR", help="checkpoint; without it the answer files in --out are scored")
    add("--image-folder", metavar="DIR", help="where the questions' image paths begin")
    add("--out", required=True, metavar="DIR", help="folder of the answer files, CONDITION.jsonl each")
    add("--conditions", type=conditions, default=",".join(CONDITIONS), metavar="LIST", help="priors, with commas")

    prior.set_defaults(expert=None, alpha=None, beta=None, gamma=None)

    # what two commands share
    for add in (score.add_argument, prior.add_argument):
        add("--truth", metavar="FILE", help="a phantom hospital's truth.jsonl: score findings and changes, too")
        add("--csv", metavar="FILE", help="add a row with the published columns; prior: a row for each score")
        add("--json", action="store_true", help="print one JSON object instead of the table")
    for add in (answer.add_argument, prior.add_argument):
        add("--questions", required=True, metavar="FILE", help="question file (JSONL), or training records")
        add("--ids", metavar="IDS", help="answer these question ids only: a file, or a list with commas")
        add("--limit", type=positive, metavar="N", help="answer the first N questions only")
        add("--batch-size", type=positive, metavar="N", help="studies decoded together; else 16, fewer with beams")
        add_model_flags(add)
        add_decoding_flags(add)
    return parser.parse_args(arguments)


def run(arguments):
    {"answer": answer, "merge": merge, "score": score, "prior": prior}[arguments.command](arguments)


def main(arguments) -> int:
    return guard("eval.py", run, arguments)


if __name__ == "__main__":
    sys.exit(main(parse()))
