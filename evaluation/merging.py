"""The answer files of all parts of a question file -> the file that one run writes, byte for byte."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

from evaluation import answering
from evaluation.answering import CONDITIONS, Part, QuestionSet, part_ids, sidecar_of
from plumbing.fields import Count, check_fields, check_value, printable
from plumbing.files import atomic, check_writable, read_json
from sample import Options


def merge(questions, answers: Path, parts: list[Path]):
    """Writes answers and their settings.json. ValueError or OSError if the parts are not those of one whole."""
    check_writable(answers)
    settings = merge_settings(parts)

    # 1) every answer of every part, each id once
    merged, files = {}, {}
    for path in parts:
        ids = part_ids(sidecar_of(path))
        lines = answering.check_answers(path, ids)
        for id, line in zip(ids, lines, strict=True):
            if id in merged:
                raise ValueError(f"{files[id]} and {path} both answer question {id}: their models are not the same")
            merged[id], files[id] = line, path

    # 2) are they the questions that were asked, all of them, as they are now?
    every = answering.read_questions(questions)
    chosen = [question for question in every if str(question.id) in merged]
    # neither images nor an expert's scores are asked for
    needed = SimpleNamespace(image_folder=None, seed=settings["seed"], expert=None, alpha=None, beta=None, gamma=None)
    asked = QuestionSet(needed, every, chosen, settings["prior"])
    if asked.digest() != settings["questions"] or len(chosen) != len(merged):
        answered = f"the parts answer {settings['questions']}"
        raise ValueError(f"{questions} gives {asked.digest()} but {answered}: give the file that was answered")

    # 3) write what one run writes
    texts = {
        sidecar_of(answers): json.dumps(settings, indent=1) + "\n",
        answers: "".join(json.dumps(merged[id]) + "\n" for id in asked.by_id),
    }
    is_other = answers.exists() and not all(holds(path, text) for path, text in texts.items())
    if answering.work_files(answers) or is_other:
        raise FileExistsError(f"{answers} holds other answers, or a run that has not ended: give another file")
    for path, text in texts.items():
        with atomic(path) as file:
            file.write(text)
    print(f"{answers}: {len(merged):,} answers from {len(parts):,} parts", file=sys.stderr)


def holds(path: Path, text: str) -> bool:
    # a pipe or a device holds nothing
    return path.is_file() and path.read_bytes() == text.encode()


def merge_settings(paths: list[Path]) -> dict:
    """The settings of the whole. ValueError if a part is missing, comes twice, or was made with other settings."""
    merged, found = {}, {}
    for path in paths:
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder: give the answer file of a part")
        # 1) which part it is; its sidecar is written when it begins, the file itself when it ends
        sidecar = sidecar_of(path)
        if not sidecar.exists():
            raise FileNotFoundError(f"{path} has no {sidecar.name} beside it: give files of eval.py answer --part")
        settings = read_json(sidecar)
        if settings.get("part") is None:
            raise ValueError(f"{path} is no part: give files of eval.py answer --part")
        try:
            part = Part.parse(check_value(settings["part"], str, "part", sidecar))
        except ValueError as error:
            raise ValueError(f"{sidecar}: {error}") from None
        if not path.exists():
            raise FileNotFoundError(f"{path} (part {part}) is not finished: run its eval.py answer again")
        if part.number in found:
            raise ValueError(f"{found[part.number]} and {path} are both part {part}: give each part once")
        found[part.number] = path

        # 2) everything else must be the same
        settings |= {"part": f"of {part.count}"}
        settings.pop("part_ids", None)
        merged = merged or settings
        changed = []
        for name in merged | settings:
            here, there = settings.get(name), merged.get(name)
            if here != there:
                changed.append(f"{printable(name, 60)} {printable(here, 60)}, not {printable(there, 60)}")
        if changed:
            raise ValueError(f"{path} was made with {'; '.join(changed)} as in {paths[0]}: answer that part again")

    # 3) are all there?
    missing = sorted(set(range(1, part.count + 1)) - found.keys())
    if missing:
        raise ValueError(f"part {missing[0]}/{part.count} is missing ({len(missing):,} in all): give every part")
    check_value(merged.get("prior"), Literal[tuple(CONDITIONS)], "prior", sidecar)
    check_value(merged.get("questions"), str, "questions", sidecar)
    check_value(merged.get("seed"), int, "seed", sidecar)
    check_value(merged.get("batch_size"), Count, "batch_size", sidecar)
    check_fields(merged, Options, sidecar)
    return merged | {"part": None}
