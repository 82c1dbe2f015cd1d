"""A model answers a question file; what it sees as the prior image is each question's own or another.

Batches are formed from all the questions before looking at what is answered, and a batch is answered as a whole. So a
run that was interrupted and is started again, a run of several processes, and runs of one part each decode the same
batches and write the same bytes.
"""

import hashlib
import json
import os
import random
import re
import sys
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

import sample
from contrast import Contrast, check_scores, guided_query
from data import ImageFolder, Question, Records, Study, check
from model import Libra
from plumbing.cli import progress
from plumbing.distributed import World
from plumbing.fields import Count, check_fields, check_value, printable, shorten
from plumbing.files import atomic, check_writable, only_writer, read_json, read_text, resumable
from plumbing.image import load_image
from plumbing.layout import find_device

CONDITIONS = {  # what the model sees beside the current image, if the question has a prior
    "true": "the patient's prior",
    "dummy": "the current image again",
    "shuffled": "another patient's prior",
    "reversed": "current and prior swapped",
    "blank": "a black image",
}


def read_questions(path) -> list[Question]:
    """ValueError with all that is wrong in the file."""
    questions = []
    check(Records(path), Question, visit=questions.append)
    return questions


def choose(questions: list[Question], arguments, only_with_prior: bool = False) -> list[Question]:
    """The questions to answer, in the file's order: those of --ids, the first --limit. ValueError if there are none."""
    kind = "question"
    if only_with_prior:
        kind = "question with a prior"
        questions = [question for question in questions if len(question.images) == 2]
    if not questions:
        raise ValueError(f"{arguments.questions} has no {kind}")

    if arguments.ids is not None:
        wanted = read_ids(arguments.ids)
        unknown = wanted - {str(question.id) for question in questions}
        if unknown:
            first = printable(min(unknown), 60)
            raise ValueError(f"{arguments.questions} has no {kind} {first} ({len(unknown):,} such --ids in all)")
        questions = [question for question in questions if str(question.id) in wanted]
    return questions[: arguments.limit]


def read_ids(ids: str) -> set[str]:
    """What --ids names: a file with an id on each line, or a list with commas. ValueError if there are none."""
    text = ids.replace(",", "\n")
    # False, not an error, for a list that is too long for a file's name
    if os.path.exists(ids) and not os.path.isdir(ids):
        text = read_text(ids)
    wanted = {line.strip() for line in text.splitlines()} - {""}
    if not wanted:
        advice = "give a file with an id on each line, or a list with commas"
        raise ValueError(f"--ids {shorten(ids)} names no id: {advice}")
    return wanted


class Part(NamedTuple):
    """Batches number, number + count, … of a question file, from 1: every part has long and short prompts."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> "Part":
        """K/N, as in 2/4; else ValueError."""
        numbers = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
        part = cls(*map(int, numbers.groups())) if numbers else cls(0, 0)
        if not 1 <= part.number <= part.count:
            raise ValueError(f"{text} is no part K/N, such as 2/4, with K from 1 to N")
        return part

    def __str__(self):
        return f"{self.number}/{self.count}"


def part_of(arguments) -> Part | None:
    """None: all of the questions, as eval.py prior answers them."""
    return getattr(arguments, "part", None)


def draw_other_priors(questions: list[Question], seed: int) -> dict[str, str]:
    """{question id: another patient's prior}, drawn by (seed, id) from all priors of the questions."""
    questions = [question for question in questions if len(question.images) == 2]
    priors = [question.images[1] for question in questions]
    if len(set(map(patient_of, priors))) == 1:
        raise ValueError("all priors are of one patient: there is no other patient's to show")

    drawn = {}
    for question, own in zip(questions, priors, strict=True):
        generator = random.Random(f"{seed}/{question.id}")
        # a draw may hit any prior of the file, but not the patient's own
        prior = own
        while patient_of(prior) == patient_of(own):
            prior = generator.choice(priors)
        drawn[str(question.id)] = prior
    return drawn


def patient_of(name: str) -> str:
    """The folder pNNNNNNNN in an image's path, as in MIMIC-CXR; without one, every image counts as a patient."""
    folders = [part for part in Path(name).parts if re.fullmatch(r"p\d{8}", part)]
    return folders[0] if folders else name


def read_experts(path, ids: Iterable[str]) -> dict[str, dict[str, float]]:
    """All of {question id: {label: probability}}, from JSONL with a question_id in each line.

    The labels are beside question_id, or together in an object "scores". ValueError where a line is wrong, an id
    comes twice, or one of `ids` has no line.
    """
    records, scores = Records(path), {}
    for number in range(len(records)):
        record, place = records[number], records.place(number)
        id = str(check_value(record.pop("question_id", None), str | int, "question_id", place))
        if id in scores:
            raise ValueError(f"{place}: question {id} has scores in an earlier line: leave one of them out")
        if list(record) == ["scores"]:
            record = record["scores"]
        scores[id] = check_scores(record, place)
    missing = [id for id in ids if id not in scores]
    if missing:
        raise ValueError(f"{path} has no scores for question {missing[0]} ({len(missing):,} such questions in all)")
    return scores


class QuestionSet:
    """The questions to answer, by their ids, and what a model sees of them under one of the CONDITIONS."""

    def __init__(self, arguments, questions: list[Question], chosen: list[Question], condition: str):
        """questions: all of the file, chosen: those to answer. No image can be found without an image_folder."""
        self.folder = None if arguments.image_folder is None else ImageFolder(arguments.image_folder, None)
        self.condition = condition
        self.by_id = {str(question.id): question for question in chosen}
        self.others = draw_other_priors(questions, arguments.seed) if condition == "shuffled" else {}
        # those of an expert, by question id
        self.scores = read_experts(arguments.expert, self.by_id) if arguments.expert is not None else None
        self.contrast = sample.contrast_of(self.scores and list(self.scores.values()), arguments)
        if self.contrast:
            sample.options_of(arguments).for_contrast()

    def contrast_for(self, batch: list[str]) -> Contrast | None:
        """The contrast of a batch of ids."""
        if self.contrast is None:
            return None
        return replace(self.contrast, scores=[self.scores[id] for id in batch])

    def query(self, id: str) -> str:
        """The longest question that the model is asked: with an expert, the guided one."""
        question = self.by_id[id].text
        return guided_query(question, self.scores[id]) if self.scores else question

    def image_names(self, question: Question) -> list[str]:
        """The image files to show, current first. A question without a prior is asked as it is."""
        if len(question.images) == 1:
            return question.images
        current, prior = question.images
        return {
            "true": [current, prior],
            "reversed": [prior, current],
            "shuffled": [current, self.others.get(str(question.id))],
            # the model takes the current image for its own prior
            "dummy": [current],
            # `prepare` draws the prior
            "blank": [current],
        }[self.condition]

    def digest(self) -> str:
        """Their number, and a hash of ids, texts, and the images that are shown."""
        seen = [(question, self.image_names(question)) for question in self.by_id.values()]
        return f"{len(seen)} questions ({hashlib.sha256(repr(seen).encode()).hexdigest()[:16]})"

    def find_images(self):
        """ValueError if an image to show is missing."""
        for question in self.by_id.values():
            with naming(question):
                for name in self.image_names(question):
                    self.folder.find(name)

    def batches(self, libra: Libra, arguments, size: int) -> list[list[str]]:
        """Batches of ids. ValueError if a prompt is too long."""
        lengths, options = {}, sample.options_of(arguments)
        for id, question in self.by_id.items():
            with naming(question):
                prompt = sample.prompt_of(libra, self.query(id), arguments.template)
                lengths[id] = sample.check_length(libra, prompt, options)
        # the longest prompts come first, so that what does not fit the memory shows at once
        order = sorted(lengths, key=lengths.get, reverse=True)
        return [order[first : first + size] for first in range(0, len(order), size)]

    def prepare(self, libra: Libra, batch: list[str]):
        """Reads the images of a batch of ids. Returns studies and pixels, as `Libra.preprocess` makes them."""
        studies, pixels = [], []
        for question in map(self.by_id.get, batch):
            with naming(question):
                files = [self.folder.find(name) for name in self.image_names(question)]
                images = [load_image(file, libra.pixels.dicom_display) for file in files]
                if self.condition == "blank" and len(question.images) == 2:
                    images.append(Image.new("RGB", images[0].size))
                # the pixels are kept, much smaller than the images; the study keeps their files' names
                pixels.append(libra.preprocess(images))
                studies.append(Study(*files, query=question.text, id=str(question.id)))
        return studies, pixels


@contextmanager
def naming(question: Question):
    """A user's mistake in here is reported with the question's id."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise ValueError(f"question {question.id}: {error}") from None


def default_batch_size(beams: int) -> int:
    """Up to 16 studies, fewer where each has many beams or samples.

    No look at the free memory, so that no batch is by chance.
    """
    return min(16, max(1, 64 // beams))


def load_model(arguments, world: World) -> Libra:
    arguments.device = str(world.local_device(find_device(arguments.device)))
    return sample.load(arguments)


def decode_batches(libra: Libra, questions: QuestionSet, batches: list[list[str]], arguments):
    """Yields the answers of each batch of ids."""
    options = sample.options_of(arguments)
    for batch in batches:
        studies, pixels = questions.prepare(libra, batch)
        try:
            contrast = questions.contrast_for(batch)
            prefix = sample.prefill(libra, studies, arguments.template, options, pixels=pixels, contrast=contrast)
            outputs = sample.decode(libra, prefix, options)
        except torch.OutOfMemoryError:
            fit = f"{len(studies)} studies together do not fit on {libra.device}"
            raise MemoryError(f"{fit}: give a smaller --batch-size") from None
        # the best sequence of each study, or the first sample; ids as the file has them, numbers or text
        answers = []
        for study, sequences in zip(studies, outputs, strict=True):
            answer = {"question_id": questions.by_id[study.id].id, "prompt": study.query}
            answer |= {"text": sequences[0].text, "model_id": arguments.model}
            if options.num_return_sequences > 1:
                answer["texts"] = [output.text for output in sequences]
            answers.append(answer)
        yield answers


def check_before(arguments, questions: QuestionSet, answers: Path) -> tuple[dict, list[str] | None]:
    """Returns the settings, and the ids of a finished answer file; None if there is something to answer.

    ValueError or OSError for whatever is wrong and shows before the model is loaded, which takes longer. The answers'
    folder may be absent.
    """
    settings = find_settings(arguments, questions, answers)
    if not answers.exists():
        questions.find_images()
        return settings, None
    ids = list(questions.by_id)
    if part_of(arguments):
        ids = part_ids(sidecar_of(answers))
    check_answers(answers, ids)
    return settings, ids


def write_answers(arguments, questions: QuestionSet, answers: Path, load: Callable[[], Libra], world: World):
    """Writes an answer file, or what an earlier run has left to do. load() returns the model.

    Each rank appends its finished batches to a work file .NAME.RANK beside the answers; at the end rank 0 merges them.
    NAME.settings.json records how the answers are made, and a run with other settings is refused. That of a part has
    the part's ids as well, which only a model's tokenizer tells.
    """
    check_writable(answers)
    settings, ids = check_before(arguments, questions, answers)
    is_complete, part = ids is not None, part_of(arguments)
    if not is_complete:
        # 1) form the batches
        ids = list(questions.by_id)
        libra = load()
        batches = questions.batches(libra, arguments, settings["batch_size"])
        if part:
            batches = batches[part.number - 1 :: part.count]
            taken = {id for batch in batches for id in batch}
            ids = [id for id in questions.by_id if id in taken]
            settings["part_ids"] = ids
        work = answers.with_name(f".{answers.name}.{world.rank}")
        with resumable(answers), open(work, "a", encoding="utf-8") as file, only_writer(file, answers):
            # 2) take this rank's share of what is not done; no rank may write before all have looked
            done = read_work(answers)
            batches = [batch for batch in batches if batch[0] not in done]
            share = batches[world.rank :: world.size]
            world.barrier()
            if world.rank == 0:
                with atomic(sidecar_of(answers)) as settings_file:
                    settings_file.write(json.dumps(settings, indent=1) + "\n")

            # 3) answer it; a finished batch is a line of the work file
            show, finished = progress(f"answering {answers.name}", "studies"), 0
            for batch in decode_batches(libra, questions, share, arguments):
                # the break comes first, to end a line that a kill has cut short
                file.write("\n" + json.dumps(batch))
                file.flush()
                os.fsync(file.fileno())
                finished += len(batch)
                if world.rank == 0:
                    show(finished, sum(map(len, share)))

            # 4) when all ranks are done, merge their answers in the questions' order
            world.barrier()
            if world.rank == 0:
                done = read_work(answers)
                with atomic(answers) as merged:
                    merged.writelines(json.dumps(done[id]) + "\n" for id in ids)

    if world.rank == 0:
        for path in work_files(answers):
            path.unlink()
        note = ", all there before" if is_complete else ""
        print(f"{answers}: {len(ids):,} answers{note}", file=sys.stderr)
    # a rank that crashed on exit would make torchrun stop the others
    world.barrier()


@dataclass
class AnswerLine:
    """The fields of a line of an answer file."""

    question_id: str | int
    prompt: str
    text: str
    model_id: str
    texts: tuple[str, ...] | None = None  # of --num-return-sequences


def parse_answer(line: dict, place) -> dict:
    """ValueError, which names the place, if a line was not written by this program."""
    fields = check_fields(dict(line), AnswerLine, place)
    if fields.keys() != line.keys() or line.keys() | {"texts"} != AnswerLine.__annotations__.keys():
        raise ValueError(f"{place} is no answer: it has the fields {shorten(list(line))}")
    return line


def sidecar_of(answers: Path) -> Path:
    return answers.parent / f"{answers.name}.settings.json"


def part_ids(sidecar: Path) -> list[str]:
    """The ids of a part, in the questions' order."""
    return check_value(read_json(sidecar).get("part_ids"), list[str], "part_ids", sidecar)


def check_answers(answers: Path, expected: list[str]) -> list[dict]:
    """The lines of a finished answer file. ValueError if it is not what was written: torn, cut short or changed."""
    # a part of few questions may have none
    if not expected and answers.stat().st_size == 0:
        return []
    try:
        records = Records(answers)
        lines = [parse_answer(records[number], records.place(number)) for number in range(len(records))]
        ids = [str(line["question_id"]) for line in lines]
        if ids != expected:
            raise ValueError(f"{answers} has {len(ids):,} answers to {len(expected):,} questions")
    except ValueError as error:
        raise ValueError(f"{error}: it is damaged; delete it and run eval.py answer again") from None
    return lines


def work_files(answers: Path) -> list[Path]:
    name = re.compile(rf"\.{re.escape(answers.name)}\.\d+")
    if not answers.parent.is_dir():
        return []
    return sorted(path for path in answers.parent.iterdir() if name.fullmatch(path.name))


def read_work(answers: Path) -> dict[str, dict]:
    """{question id: answer} of all finished batches, whichever rank has answered them."""
    done = {}
    for path in work_files(answers):
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                batch = json.loads(line)
            except (ValueError, RecursionError):  # empty, or cut short by a kill or a full disk
                continue
            try:
                for answer in batch:
                    done[str(answer["question_id"])] = parse_answer(answer, path)
            except (ValueError, TypeError, KeyError):
                raise ValueError(f"{path} holds a line that is no batch of answers: delete the file") from None
    return done


def find_settings(arguments, questions: QuestionSet, answers: Path) -> dict:
    """All that the answers depend on. FileExistsError or ValueError if there are answers with other settings."""
    # 1) what the sidecar of earlier answers records
    sidecar, begun = sidecar_of(answers), {}
    files = [path for path in (answers, *work_files(answers)) if path.exists()]
    if answers.exists() or read_work(answers):
        if not sidecar.exists():
            raise FileExistsError(f"{files[0]} exists, but no {sidecar.name} says how it was made: delete or move it")
        try:
            begun = read_json(sidecar)
        except ValueError:
            begun = {}
        if not begun:
            delete = ", ".join(map(str, [*files, sidecar]))
            raise ValueError(f"{sidecar} holds no settings: delete {delete}, and run this again")

    # 2) what this run asks for; a batch size need not be given again
    options, part = sample.options_of(arguments), part_of(arguments)
    size = check_value(begun.get("batch_size"), Count | None, "batch_size", sidecar)
    size = arguments.batch_size or size or default_batch_size(max(options.num_beams, options.num_return_sequences))
    settings = {
        "model": arguments.model,
        "base": arguments.base,
        "encoder": arguments.encoder,
        "dtype": arguments.dtype,
        "device": find_device(arguments.device).type,
        "template": arguments.template,
        "dicom_display": arguments.dicom_display,
        "questions": questions.digest(),
        "prior": questions.condition,
        "image_folder": str(questions.folder.root),
        "batch_size": size,
        "expert": None,
        "part": str(part) if part else None,
        **asdict(options),
    }
    # a change of the scores is another setting
    if questions.contrast:
        digest = hashlib.sha256(repr(questions.contrast).encode()).hexdigest()
        weights = {name: getattr(questions.contrast, name) for name in ("alpha", "beta", "gamma")}
        settings["expert"] = f"{arguments.expert} ({digest[:16]}, {weights})"

    # 3) both must be the same
    changed = []
    for name, value in settings.items():
        if begun and begun.get(name) != value:
            changed.append(f"{name} {printable(begun.get(name), 60)}, not {value}")
    if changed:
        delete = ", ".join(map(str, [*files, sidecar]))
        raise ValueError(f"{answers} was made with {'; '.join(changed)}: give another file, or delete {delete}")
    return settings
