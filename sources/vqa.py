"""Two sets of questions about MIMIC-CXR: MIMIC-Diff-VQA (a study and its reference study) and
MIMIC-Ext-MIMIC-CXR-VQA (one image), both from PhysioNet.

Their columns are taken from public descriptions; a missing one is an error that lists what the file has.
"""

import re
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path
from typing import NamedTuple

from data import Records
from plumbing.cli import progress
from sources.inputs import directory, one_line, only_one, read_csv, require
from sources.mimic import Image, on_disk, read_tables, root_of, time_key
from sources.outputs import SPLITS, Example, announce, finish, missing, plan, writer

# the columns that must be there
DIFF_VQA = ("study_id", "subject_id", "ref_id", "question_type", "question", "answer", "split")
CXR_VQA = ("subject_id", "study_id", "image_id", "image_path", "question", "semantic_type", "content_type", "answer")
CXR_VQA_FILES = {"train": "*train.json", "validate": "*valid.json", "test": "*test.json"}


# ------------------------------------------------------------------------------------- MIMIC-Diff-VQA


class StudyImage(NamedTuple):
    """The image that stands for a study, or why there is none."""

    path: str | None
    problem: str = ""


def last_frontal(images: list[Image], root: Path) -> StudyImage:
    """The latest frontal image on disk among the images of a study."""
    frontal = [image for image in images if image.frontal]
    for image in sorted(frontal, key=time_key, reverse=True):
        path = on_disk(root, image.stem)
        if path:
            return StudyImage(path)
    if frontal:
        return StudyImage(None, "has no frontal image on disk")
    return StudyImage(None, "has no frontal image" if images else "has no metadata")


def prepare_diff_vqa(root, out, questions, question_type: str | None = None):
    """mimic_pair_questions.csv -> questions about a study's image with the reference study's image as its prior.

    question_type keeps one type of question only, in files of that name.
    """
    name = question_type or "diff_vqa"
    root, outputs = root_of(root), plan(out, [name])
    skipped, types = Counter(), Counter()
    announce(outputs)
    if missing(outputs):
        # 1) the images of every study
        studies = defaultdict(list)
        for image in read_tables(root, skipped).images.values():
            studies[image.study].append(image)

        @cache
        def image_of(study: str) -> StudyImage:
            # study ids may be written s50414267 or 50414267.0
            number = study.removeprefix("s").removesuffix(".0")
            return last_frontal(studies.get(number, []), root)

        # 2) the questions that can be used
        with writer(outputs) as write:
            rows = read_csv(Path(questions), DIFF_VQA, skipped)
            for number, (study, _, reference, kind, question, answer, split) in enumerate(rows):
                split = "validate" if split == "val" else split
                current, prior = image_of(study), image_of(reference)
                if split not in SPLITS:
                    skipped["questions of a split of another name"] += 1
                elif not (question and answer):
                    skipped["questions without a question or an answer"] += 1
                elif question_type not in (None, kind):
                    skipped["questions of another type"] += 1
                elif current.problem:
                    skipped[f"questions whose study {current.problem}"] += 1
                elif prior.problem:
                    skipped[f"questions whose reference study {prior.problem}"] += 1
                else:
                    types[kind] += 1
                    images = [current.path, prior.path]
                    write(Example(name, split, f"diff_vqa_{number}", images, question=question, answer=answer))
            # raised before the writer ends, so that no file appears
            if question_type and not types:
                raise ValueError(f"{questions} has no usable question of type {question_type!r}: check --type")
    finish(outputs, skipped, {"question_type": types})


# ---------------------------------------------------------------------------- MIMIC-Ext-MIMIC-CXR-VQA


def prepare_cxr_vqa(root, out, questions):
    """The folder of train.json, valid.json and test.json -> questions about one image without a prior."""
    root, folder, outputs = root_of(root), directory(questions), plan(out, ["cxr_vqa"])
    skipped, kinds = Counter(), {"semantic_type": Counter(), "content_type": Counter()}
    announce(outputs)
    for split, pattern in CXR_VQA_FILES.items():
        if not any(folder.glob(pattern)):
            skipped[f"missing file {pattern}"] += 1
        elif missing(outputs, split):
            rows = Records(only_one(folder, pattern))
            show = progress(f"reading {rows.path.name}", "questions")
            with writer(outputs) as write:
                for number, row in enumerate(rows):
                    show(number + 1, len(rows))
                    require(CXR_VQA, row, rows.place(number))
                    image, answer = _image_of(row, root), _answer_of(row)
                    if not answer:
                        skipped["questions with an empty answer"] += 1
                    elif not image:
                        skipped["questions whose image is missing on disk"] += 1
                    else:
                        for kind, counts in kinds.items():
                            counts[str(row[kind])] += 1
                        question, name = one_line(str(row["question"])), f"cxr_vqa_{split}_{number}"
                        write(Example("cxr_vqa", split, name, [image], question=question, answer=answer))
    finish(outputs, skipped, kinds)


def _image_of(row: dict, root: Path) -> str | None:
    # image_path may begin with other folders and end with any suffix: p10/p10000032/s50414267/DICOM_ID is what counts
    stem = re.search(r"p\d\d/p\d+/s\d+/[\w-]+(?=\.\w+$|$)", str(row["image_path"]))
    return on_disk(root, f"files/{stem[0]}") if stem else None


def _answer_of(row: dict) -> str:
    # an answer is a list, which may be empty
    answers = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
    return one_line(", ".join(map(str, answers)))
