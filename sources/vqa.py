"""Questions about MIMIC-CXR from PhysioNet: MIMIC-Diff-VQA (a study and an earlier one), MIMIC-Ext-MIMIC-CXR-VQA."""

import re
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path

from data import Records
from sources.mimic import Mimic, on_disk
from sources.records import SPLITS, directory, one_line, only_one, plan, read_csv, require, writer

# columns, from public descriptions of the data sets
DIFF_VQA = ("study_id", "subject_id", "ref_id", "question_type", "question", "answer", "split")
CXR_VQA = ("subject_id", "study_id", "image_id", "image_path", "question", "semantic_type", "content_type", "answer")
CXR_VQA_FILES = {"train": "*train.json", "validate": "*valid.json", "test": "*test.json"}


def prepare_diff_vqa(root, out, questions, question_type: str | None = None):
    """Questions about a study's last frontal image, with that of its reference study as the prior.

    question_type: only questions of this type, in files of its name.
    """
    name, types, mimic = question_type or "diff_vqa", Counter(), Mimic(root)
    outputs, skipped = plan(out, [name]), mimic.skipped
    if all(path.exists() for path in outputs):
        return outputs, {}, {}
    mimic.read_tables()
    studies = defaultdict(list)
    for image in mimic.images.values():
        studies[image.study].append(image)

    @cache
    def last_frontal(study: str) -> str:
        """The path of a study's last frontal image on disk, or ""."""
        # a study may be written 50414267, s50414267 or 50414267.0
        study = study.removeprefix("s").removesuffix(".0")
        paths = [on_disk(mimic.root, image.stem) for image in sorted(studies[study]) if image.frontal]
        return next(filter(None, reversed(paths)), "")

    with writer(outputs) as write:
        rows = read_csv(Path(questions), DIFF_VQA, skipped)
        for number, (study, _, reference, kind, question, answer, split) in enumerate(rows):
            split = "validate" if split == "val" else split
            images = [last_frontal(study), last_frontal(reference)]  # [current, prior]
            if split not in SPLITS:
                skipped["questions of a split of another name"] += 1
            elif not (question and answer):
                skipped["questions without a question or an answer"] += 1
            elif question_type not in (None, kind):
                skipped["questions of another type"] += 1
            elif not all(images):
                skipped["questions about a study, or beside one, without a frontal image on disk"] += 1
            else:
                types[kind] += 1
                write(f"{name}_{split}", f"diff_vqa_{number}", images, question=question, answer=answer)
        # an error inside the writer leaves no files
        if question_type and not types:
            raise ValueError(f"{questions} has no question of type {question_type!r} that can be used")
    return outputs, skipped, {"question_type": types}


def prepare_cxr_vqa(root, out, questions):
    """Questions about one image, from a folder with train.json, valid.json and test.json."""
    root, folder = directory(f"{root}/files").parent, directory(questions)
    skipped, kinds = Counter(), {"semantic_type": Counter(), "content_type": Counter()}
    outputs = plan(out, ["cxr_vqa"])
    for split, pattern in CXR_VQA_FILES.items():
        if not any(folder.glob(pattern)):
            skipped[f"missing file {pattern}"] += 1
            continue
        rows, name = Records(only_one(folder, pattern)), f"cxr_vqa_{split}"
        with writer(outputs) as write:
            for number, row in enumerate(rows):
                require(CXR_VQA, row, rows.place(number))
                answers = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
                answer = one_line(", ".join(map(str, answers)))
                # p10/p10000032/s50414267/DICOM_ID, perhaps inside other folders and with any suffix
                stem = re.search(r"p\d\d/p\d+/s\d+/[\w-]+(?=\.\w+$|$)", str(row["image_path"]))
                path = on_disk(root, f"files/{stem[0]}") if stem else ""
                if not answer:
                    skipped["questions with an empty answer"] += 1
                elif not path:
                    skipped["questions whose image is missing on disk"] += 1
                else:
                    for kind, counts in kinds.items():
                        counts[str(row[kind])] += 1
                    question = one_line(str(row["question"]))
                    write(name, f"{name}_{number}", [path], question=question, answer=answer)
    return outputs, skipped, kinds
