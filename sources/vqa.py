"""Questions about MIMIC-CXR from PhysioNet: MIMIC-Diff-VQA (a study and an earlier one), MIMIC-Ext-MIMIC-CXR-VQA."""

import re
from collections import Counter
from functools import cache
from pathlib import Path

from data import Records, value_of
from sources.mimic import Image, Mimic, on_disk
from sources.records import SPLITS, directory, one_line, only_one, plan, read_csv, require, writer

# columns, from public descriptions of the data sets
DIFF_VQA = ("study_id", "subject_id", "ref_id", "question_type", "question", "answer", "split")
CXR_VQA = ("subject_id", "study_id", "image_id", "image_path", "question", "semantic_type", "content_type", "answer")
CXR_VQA_FILES = {"train": "train.json", "validate": "valid.json", "test": "test.json"}


def prepare_diff_vqa(root, out, questions, question_type: str | None = None):
    """Questions about an image of a study, with that of its reference study as the prior.

    Which image is the data set's choice: mimic_all.csv, beside the questions, names one for each study. Without that
    file its rule is followed (get_mimic_all.py in https://github.com/Holipori/MIMIC-Diff-VQA): the first frontal image
    of the study in the metadata. question_type: only questions of this type, in files of its name.
    """
    name, types, mimic = question_type or "diff_vqa", Counter(), Mimic(root)
    outputs, skipped = plan(out, [name]), mimic.skipped
    if all(path.exists() for path in outputs):
        return outputs, {}, {}
    mimic.read_tables()
    chosen = choose_images(mimic, Path(questions))

    @cache
    def path_of(study: str) -> str:
        """The path of a study's image, or "" if it is not on disk."""
        image = chosen.get(plain(study))
        return on_disk(mimic.root, image.stem) if image else ""

    with writer(outputs) as write:
        rows = read_csv(Path(questions), DIFF_VQA, skipped)
        for number, (study, _, reference, kind, question, answer, split) in enumerate(rows):
            split = "validate" if split == "val" else split
            images = [path_of(study), path_of(reference)]  # [current, prior]
            if split not in SPLITS:
                skipped["questions of a split of another name"] += 1
            elif not (question and answer):
                skipped["questions without a question or an answer"] += 1
            elif question_type not in (None, kind):
                skipped["questions of another type"] += 1
            elif not all(images):
                skipped["questions about a study, or beside one, without its image on disk"] += 1
            else:
                types[kind] += 1
                write(f"{name}_{split}", f"diff_vqa_{number}", images, question=question, answer=answer)
        # an error inside the writer leaves no files
        if question_type and not types:
            raise ValueError(f"{questions} has no question of type {question_type!r} that can be used")
    return outputs, skipped, {"question_type": types}


def plain(study: str) -> str:
    """A study may be written 50414267, s50414267 or 50414267.0."""
    return study.removeprefix("s").removesuffix(".0")


def choose_images(mimic: Mimic, questions: Path) -> dict[str, Image]:
    """{study: the image that the questions of MIMIC-Diff-VQA are about}."""
    chosen = {}
    tables = [questions.with_name(f"mimic_all.csv{suffix}") for suffix in ("", ".gz")]
    for table in filter(Path.exists, tables):
        for study, dicom in read_csv(table, ("study_id", "dicom_id"), mimic.skipped):
            image = mimic.images.get(dicom)
            if image and image.study == plain(study):
                chosen.setdefault(image.study, image)
            else:
                mimic.skipped["studies whose image in mimic_all.csv is not theirs in the metadata"] += 1
        return chosen

    mimic.skipped["no mimic_all.csv beside the questions: a study is shown by its first frontal image"] += 1
    for image in mimic.images.values():
        if image.frontal:
            chosen.setdefault(image.study, image)
    return chosen


def prepare_cxr_vqa(root, out, questions):
    """Questions about one image, from a folder with train.json, valid.json and test.json."""
    root, folder = directory(f"{root}/files").parent, directory(questions)
    skipped, kinds = Counter(), {"semantic_type": Counter(), "content_type": Counter()}
    outputs = plan(out, ["cxr_vqa"])
    # 1) find all files before one is written
    files = {}
    for split, ending in CXR_VQA_FILES.items():
        if any(folder.glob(f"*{ending}")):
            exact = folder / ending
            files[split] = exact if exact.exists() else only_one(folder, f"*{ending}")
        else:
            skipped[f"missing file *{ending}"] += 1

    # 2) write
    with writer(outputs) as write:
        for split, file in files.items():
            rows, name = Records(file), f"cxr_vqa_{split}"
            for number, row in enumerate(rows):
                require(CXR_VQA, row, rows.place(number))
                try:
                    question, image, *types = (value_of(row, name, str) for name in ("question", "image_path", *kinds))
                    answers = value_of(row, "answer", str | list[str])
                except ValueError as error:
                    reason, _ = str(error).split(": ", 1)
                    skipped[f"questions whose {reason}"] += 1
                    continue
                question = one_line(question)
                answer = one_line(answers if isinstance(answers, str) else ", ".join(answers))
                # p10/p10000032/s50414267/DICOM_ID, perhaps inside other folders and with any suffix
                stem = re.search(r"p\d\d/p\d+/s\d+/[\w-]+(?=\.\w+$|$)", image)
                path = on_disk(root, f"files/{stem[0]}") if stem else ""
                if not answer:
                    skipped["questions with an empty answer"] += 1
                elif not question:
                    skipped["questions with an empty text"] += 1
                elif not path:
                    skipped["questions whose image is missing on disk"] += 1
                else:
                    for counts, type in zip(kinds.values(), types, strict=True):
                        counts[type] += 1
                    write(name, f"{name}_{number}", [path], question=question, answer=answer)
    return outputs, skipped, kinds
