"""Raw data sets -> record and question files that training and evaluation read.

    python prepare.py mimic-cxr --root mimic-cxr-jpg/2.0.0 --reports mimic-cxr-reports --out data

A split comes out as NAME_SPLIT.jsonl (training records: train, validate) and NAME_SPLIT_questions.jsonl (validate,
test), one JSON object a line; image paths begin with files/ and are relative to ROOT, which is the image folder of all
that follows. A file appears when it is whole, and one that is there is kept: a rerun makes what is missing.
"""

import argparse
import os
import sys

from plumbing.cli import Parser, guard, parallel, print_table, progress
from sources.mimic import SECTIONS


def parse(arguments=None):
    parser = Parser(prog="prepare.py", description="Raw data sets -> record and question files.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)

    def command(name, text):
        settings = {"formatter_class": argparse.ArgumentDefaultsHelpFormatter}
        return commands.add_parser(name, help=text, description=text, **settings).add_argument

    def folders(add):
        add("--root", required=True, metavar="DIR", help="MIMIC-CXR: the folder of files/ and the metadata")
        add("--out", required=True, metavar="DIR", help="where the record and question files go")

    add = command("phantom", "draw a small synthetic hospital, laid out as MIMIC-CXR is")
    add("--out", required=True, metavar="DIR", help="where the hospital is built")
    add("--patients", type=int, default=200, metavar="N", help="number of patients")
    add("--seed", type=int, default=0, metavar="S", help="seed of everything that is drawn")
    add("--size", type=int, default=128, metavar="PX", help="side of the images, pixels")
    add("--workers", type=int, default=os.cpu_count(), metavar="N", help="processes that draw")
    add("--dicom", action="store_true", help="write DICOM files, too")
    add("--preview", action="store_true", help="draw some patients over time in OUT/preview.png, too")

    add = command("mimic-cxr", "reports and metadata -> findings and impressions beside current and prior image")
    folders(add)
    add("--reports", metavar="DIR", help="the folder of files/pNN/pNNNNNNNN/sNNNNNNNN.txt; without it ROOT")
    add("--section", default="both", choices=(*SECTIONS, "both"), help="what is to be written from the images")
    add("--no-context", action="store_true", help="ask without the clinical context, in SECTION_no_context_SPLIT.jsonl")

    add = command("diff-vqa", "MIMIC-Diff-VQA: questions about a study beside its reference study")
    folders(add)
    add("--questions", required=True, metavar="CSV", help="mimic_pair_questions.csv, plain or gzip")
    add("--type", metavar="NAME", help="only questions of this question_type, such as difference, to NAME_SPLIT.jsonl")

    add = command("cxr-vqa", "MIMIC-Ext-MIMIC-CXR-VQA: questions about one image")
    folders(add)
    add("--questions", required=True, metavar="DIR", help="the folder of train.json, valid.json and test.json")

    add = command("rrg", "the published evaluation set (Hugging Face, an extra: pip install datasets)")
    add("--source", default="X-iZhang/MIMIC-CXR-RRG", metavar="ID_OR_DIR", help="hub id, or a folder of parquet files")
    add("--configuration", default="findings_section", choices=("findings_section", "impression_section"),
        help="what is to be written from the images")  # fmt: skip
    add("--split", default="test", metavar="NAME", help="split of the data set")
    add("--reference", metavar="COLUMN", help="column of the true text; without it the questions have no reference")
    add("--out", required=True, metavar="DIR", help="where the question file and images/ go")

    add = command("check", "check a JSON or JSONL file of your own, record by record")
    add("file", metavar="FILE", help="training records or questions, in the published format")
    add("--image-folder", metavar="DIR", help="where the images are; without it they are not looked for")

    add = command("cache", "pad, resize and crop every image once, so that training need not decode it again")
    add("--records", nargs="+", required=True, metavar="FILE", help="record or question files, JSON or JSONL")
    add("--image-folder", required=True, metavar="DIR", help="where the images that they name are")
    add("--model", required=True, metavar="ID_OR_DIR", help="checkpoint or image encoder: a folder or a hub id")
    add("--pad", default="black", choices=("black", "mean", "none"),
        help="how images become square: black as in training, the mean colour as in inference, or cropped")  # fmt: skip
    add("--out", required=True, metavar="DIR", help="where the cache is made, added to, or gone on with")
    add("--workers", type=int, default=os.cpu_count(), metavar="N", help="processes that decode images")
    arguments = parser.parse_args(arguments)
    if getattr(arguments, "workers", 1) < 1:
        parser.error(f"--workers {arguments.workers} is not at least 1")
    return arguments


if __name__ == "__main__":  # before torch is imported, so that --help and mistakes answer at once
    ARGUMENTS = parse()

# ruff: noqa: E402
import errno
import fcntl
import hashlib
import io
import json
import re
import time
import zlib
from array import array
from collections import Counter
from contextlib import ExitStack, contextmanager
from functools import lru_cache, partial
from itertools import groupby
from pathlib import Path

import numpy as np
from PIL import Image

from data import (
    FINDINGS_PROMPT,
    FRAMES,
    INDEX,
    ImageFolder,
    Question,
    Record,
    Records,
    cache_settings,
    image_names,
    parse_index,
)
from data import check as check_records
from phantom import hospital as phantom
from plumbing import checkpoint
from plumbing.files import atomic, read_json
from plumbing.pixels import PixelConfig, open_clip_pixels, pixel_config
from sources import mimic
from sources.mimic import directory, on_disk, only_one, read_csv, require, root_of
from tokenizer import IMAGE_TEXT

PROMPTS = {"findings": FINDINGS_PROMPT, "impression": FINDINGS_PROMPT.replace("findings", "impression")}
CONTEXT = ("indication", "history")  # sections that the published prompt repeats, in this order
SPLITS = {"train": ("records",), "validate": ("records", "questions"), "test": ("questions",)}
DIFF_VQA = ("study_id", "subject_id", "ref_id", "question_type", "question", "answer", "split")  # columns
CXR_VQA = ("subject_id", "study_id", "image_id", "image_path", "question", "semantic_type", "content_type", "answer")
RRG = ("main_image", "prior_image", "default_prompt")


def prompt(section: str, found: dict[str, str]) -> str:
    """The published question for a section, with the study's clinical context where its report has any."""
    context = [f"{name.capitalize()}: {line(found[name])}" for name in CONTEXT if line(found.get(name, ""))]
    return " ".join([PROMPTS[section], *(["Following clinical context:", *context] if context else [])])


def line(text: str) -> str:
    """Text on one line: reports are wrapped at some 80 characters, and their breaks mean nothing."""
    return " ".join(text.split())


# ------------------------------------------------------------------------------------------------ writing


def plan(out, names, splits=SPLITS) -> dict[tuple[str, str, str], Path]:
    """(name, split, kind) -> the file that holds it."""
    ends = {"records": "", "questions": "_questions"}
    return {
        (name, split, kind): Path(out) / f"{name}_{split}{ends[kind]}.jsonl"
        for split, kinds in splits.items()
        for name in names
        for kind in kinds
    }


def missing(files, split=None):
    return {key: path for key, path in files.items() if not path.exists() and split in (None, key[1])}


@contextmanager
def writer(files):
    """write(name, split, id, images, text, answer or None) into those of the planned files that are not there yet.

    They appear when all is written; one without a record does not.
    """
    todo, opened = missing(files), {}
    with ExitStack() as stack:

        def write(name, split, number, images, text, answer):
            images = [image for image in images if image]
            for key, path in todo.items():
                if key[:2] != (name, split):
                    continue
                if key[2] == "records":
                    turns = ("human", f"{IMAGE_TEXT}\n{text}"), ("gpt", answer)
                    turns = [{"from": speaker, "value": value} for speaker, value in turns]
                    record = {"id": number, "image": images, "conversations": turns}
                else:
                    record = {"question_id": number, "image": images, "text": text, "reference": answer}
                    record = {name: value for name, value in record.items() if value is not None}
                if key not in opened:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    opened[key] = stack.enter_context(atomic(path))
                opened[key].write(json.dumps(record) + "\n")

        yield write


# ------------------------------------------------------------------------------------------------- tables

TABLE = ("file", "patients", "studies", "records", "with prior", "questions per image pair", "words per answer")


def kind_of(records: Records) -> type[Record] | type[Question]:
    return Question if "question_id" in records[0] else Record


def describe(records: Records) -> tuple:
    """A row of TABLE for a file without a fault; patients and studies are told by MIMIC-CXR's folders."""
    kind, show = kind_of(records), progress(f"counting {records.path.name}", "records")
    distinct = {name: array("q") for name in ("patient", "study", "pair")}  # hashes: 8 bytes a record
    questions = answers = words = with_prior = 0
    for number, record in enumerate(map(kind.parse, records), 1):
        turns = record.turns if kind is Record else [(record.text, record.reference)]
        folders = re.match(r"files/(p\d+/p\d+)/(s\d+)/", record.images[0] if record.images else "")
        if folders:
            distinct["patient"].append(hash(folders[1]))
            distinct["study"].append(hash(folders[0]))
        distinct["pair"].append(hash(tuple(record.images)))
        with_prior += len(record.images) == 2
        told = [answer for _, answer in turns if answer is not None]
        questions, answers = questions + len(turns), answers + len(told)
        words += sum(len(answer.split()) for answer in told)
        show(number, len(records))
    patients, studies, pairs = (len(np.unique(np.asarray(hashes))) for hashes in distinct.values())
    share = f"{with_prior:,} ({with_prior / len(records):.0%})"
    pace = f"{questions / pairs:.1f}", f"{words / answers:.1f}" if answers else "-"
    return records.path.name, patients or "-", studies or "-", len(records), share, *pace


def announce(files):
    """Say which of the planned files are kept."""
    kept = [path.name for path in files.values() if path.exists()]
    if kept:
        print(f"kept, as they are there: {', '.join(kept)} (delete a file to make it again)", file=sys.stderr)


def finish(files, skipped: Counter, kinds: dict[str, Counter] | None = None):
    """Print the table of all planned files that exist and what was left out; ValueError where there is none at all."""
    rows = sorted((count, reason) for reason, count in skipped.items() if count)
    made = [path for path in files.values() if path.exists()]
    if not made:
        reasons = "; ".join(f"{count} {reason}" for count, reason in reversed(rows))
        raise ValueError(f"no record came of it: {reasons or 'the input is empty'}")
    print_table([TABLE, *(describe(Records(path)) for path in made)])
    for name, counts in (kinds or {}).items():
        if counts:
            print(f"\n{name}: " + ", ".join(f"{kind} {count}" for kind, count in sorted(counts.items())))
    print("\nleft out or special in this run:" if rows else "\nnothing was left out in this run")
    print("".join(f"{count:>9}  {reason}\n" for count, reason in reversed(rows)), end="")


# ----------------------------------------------------------------------------------------------- commands


def make_phantom(arguments):
    show = progress("drawing", "patients")
    settings = {name: getattr(arguments, name) for name in ("seed", "size", "workers", "dicom")}
    counts = phantom.write(arguments.out, arguments.patients, progress=show, **settings)
    if arguments.preview:
        with atomic(Path(arguments.out) / "preview.png", "wb") as file:
            phantom.few_colours(phantom.preview(arguments.seed)).save(file, "PNG", optimize=True)
    print_table(counts.items())


def mimic_cxr(arguments):
    root, reports, skipped = root_of(arguments.root), root_of(arguments.reports or arguments.root), Counter()
    names = SECTIONS if arguments.section == "both" else (arguments.section,)
    files_of = {name: f"{name}_no_context" if arguments.no_context else name for name in names}
    files = plan(arguments.out, files_of.values())
    announce(files)
    if missing(files):
        with mimic.index(root, skipped) as db:
            count_oddities(db, skipped)
            for split in SPLITS:
                if missing(files, split):
                    with writer(files) as write:
                        for name, *where, asked, text in section_records(db, split, names, root, reports, skipped):
                            write(files_of[name], *where, PROMPTS[name] if arguments.no_context else asked, text)
    finish(files, skipped)


def count_oddities(db, skipped: Counter):
    count = lambda query: db.execute(f"SELECT count(*) FROM {query}").fetchone()[0]
    skipped["images that are not frontal (view AP or PA)"] += count("image WHERE NOT frontal")
    without = "image LEFT JOIN split USING(dicom) WHERE frontal AND split IS NULL"
    skipped["frontal images without a split"] += count(without)
    known = ", ".join(f"'{name}'" for name in SPLITS)
    skipped["images of a split of another name"] += count(f"split WHERE split NOT IN ({known})")
    without = "(SELECT study FROM split EXCEPT SELECT study FROM image)"
    skipped["studies of the split file without metadata"] += count(without)
    several = "(SELECT 1 FROM image JOIN split USING(dicom) GROUP BY subject HAVING count(DISTINCT split) > 1)"
    skipped["patients in more than one split; their priors come from the same split"] += count(several)


def section_records(db, split, names, root: Path, reports: Path, skipped: Counter):
    """(section, split, dicom id, [image, prior or None], prompt, text) of a split, patient after patient."""
    query = "FROM image JOIN split USING(dicom) WHERE frontal AND split = ?"
    (total,) = db.execute(f"SELECT count(*) {query}", (split,)).fetchone()
    show, done = progress(split, "images"), 0
    rows = db.execute(f"SELECT subject, image.study, date, time, dicom {query} ORDER BY subject", (split,))
    for subject, group in groupby(rows, key=lambda row: row[0]):
        frontal, found = [], {}
        for _, study, date, hour, dicom in group:
            path = on_disk(root, mimic.stem_of(subject, study, dicom))
            done += 1
            if path:
                frontal.append(mimic.Frontal(date, hour, dicom, study, path))
            else:
                skipped["frontal images missing or empty on disk"] += 1
        for image, prior in mimic.priors(frontal):
            skipped["images without a readable date: no prior"] += not image.date
            if image.study not in found:
                found[image.study] = mimic.read_study(reports, subject, image.study, skipped)
            for name in names:
                text = line(found[image.study].get(name, ""))
                if any(map(str.isalpha, text)):
                    paths = image.path, prior and prior.path
                    yield name, split, image.dicom, paths, prompt(name, found[image.study]), text
                else:
                    skipped[f"images of a study without {name}"] += 1
        show(done, total)


def diff_vqa(arguments):
    name = arguments.type or "diff_vqa"
    files, skipped, kinds = plan(arguments.out, [name]), Counter(), Counter()
    root = root_of(arguments.root)
    announce(files)
    if missing(files):
        with mimic.index(root, skipped) as db, writer(files) as write:
            image_of = lru_cache(maxsize=4096)(lambda study: mimic.last_frontal(db, root, study))
            rows = read_csv(Path(arguments.questions), DIFF_VQA, skipped)
            for number, (main, _, reference, kind, question, answer, split) in enumerate(rows):
                split = {"val": "validate"}.get(split, split)
                (current, problem), (prior, prior_problem) = image_of(main), image_of(reference)
                if split not in SPLITS:
                    skipped["questions of a split of another name"] += 1
                elif not (question and answer):
                    skipped["questions without a question or an answer"] += 1
                elif arguments.type not in (None, kind):
                    skipped["questions of another type"] += 1
                elif problem or prior_problem:
                    which = "study" if problem else "reference study"
                    skipped[f"questions whose {which} {problem or prior_problem}"] += 1
                else:
                    kinds[kind] += 1
                    write(name, split, f"diff_vqa_{number}", (current, prior), question, answer)
            if arguments.type and not kinds:
                raise ValueError(f"{arguments.questions} has no question of type {arguments.type!r} that can be used")
    finish(files, skipped, {"question_type": kinds})


def cxr_vqa(arguments):
    files, skipped = plan(arguments.out, ["cxr_vqa"]), Counter()
    kinds = {"semantic_type": Counter(), "content_type": Counter()}
    root, folder = root_of(arguments.root), directory(arguments.questions)
    announce(files)
    for split, name in {"train": "*train.json", "validate": "*valid.json", "test": "*test.json"}.items():
        if not any(folder.glob(name)):
            skipped[f"file {name}, which is not there"] += 1
        elif missing(files, split):
            rows = Records(only_one(folder, name))
            show = progress(f"reading {rows.path.name}", "questions")
            with writer(files) as write:
                for place, row in enumerate(rows):
                    show(place + 1, len(rows))
                    require(CXR_VQA, row, rows.place(place))
                    answers = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
                    answer = line(", ".join(map(str, answers)))
                    stem = re.search(r"p\d\d/p\d+/s\d+/[\w-]+(?=\.\w+$|$)", str(row["image_path"]))
                    path = stem and on_disk(root, f"files/{stem[0]}")
                    if not answer:
                        skipped["questions with an empty answer"] += 1
                    elif not path:
                        skipped["questions whose image is missing on disk"] += 1
                    else:
                        for kind, counts in kinds.items():
                            counts[str(row[kind])] += 1
                        write("cxr_vqa", split, f"cxr_vqa_{split}_{place}", [path], line(str(row["question"])), answer)
    finish(files, skipped, kinds)


def rrg(arguments):
    name, split, reference = arguments.configuration, arguments.split, arguments.reference
    out, skipped = Path(arguments.out), Counter()
    files = plan(out, [name], {split: ("questions",)})
    announce(files)
    if missing(files):
        rows, total = published_rows(arguments.source, name, split, [reference] if reference else [])
        show = progress(f"{name} {split}", "studies")
        with writer(files) as write:
            for place, row in enumerate(rows):
                try:
                    main, prior = (save_image(out, row[column], arguments.source) for column in RRG[:2])
                except (OSError, Image.DecompressionBombError):
                    main = prior = None
                if main:
                    pair = main, prior if prior != main else None  # the current image again is a dummy
                    answer = line(row[reference] or "") if reference else None
                    write(name, split, f"{name}_{split}_{place}", pair, row["default_prompt"], answer)
                else:
                    skipped["rows whose image is missing or cannot be read"] += 1
                show(place + 1, max(total, place + 1))
    finish(files, skipped)


def published_rows(source: str, configuration: str, split: str, more) -> tuple:
    """(rows as dicts with undecoded images, their number or 0) of a data set on the hub or in parquet files."""
    try:
        import datasets
        from pyarrow import parquet
    except ImportError:
        raise ValueError("this data set is read through another package: pip install datasets") from None
    if Path(source).is_dir():
        places = Path(source, configuration), Path(source)
        found = next(filter(None, (sorted(place.glob(f"{split}*.parquet")) for place in places)), None)
        if not found:
            raise ValueError(f"no {split}*.parquet in {places[1]} or {places[0]}: check --source and --split")
        rows = datasets.load_dataset("parquet", data_files=list(map(str, found)), split="train", streaming=True)
        total = sum(parquet.read_metadata(path).num_rows for path in found)
    else:
        rows = datasets.load_dataset(source, configuration, split=split, streaming=True)
        total = rows.info.splits[split].num_examples if split in (rows.info.splits or {}) else 0
    require([*RRG, *more], rows.column_names or next(iter(rows)), source)
    for column in RRG[:2]:
        rows = rows.cast_column(column, datasets.Image(decode=False))
    return rows, total


def save_image(out: Path, image: dict | None, source: str) -> str | None:
    """{"bytes", "path"} -> images/HASH.jpg under `out`, written once; OSError where it is missing or no image."""
    if image is None:
        return None
    data = image["bytes"] or Path(source, image["path"]).read_bytes()
    kind = Image.open(io.BytesIO(data)).format.lower()
    path = f"images/{hashlib.sha256(data).hexdigest()[:32]}.{'jpg' if kind == 'jpeg' else kind}"
    if not (out / path).exists():
        (out / "images").mkdir(parents=True, exist_ok=True)
        with atomic(out / path, "wb") as file:
            file.write(data)
    return path


def check(arguments):
    records = Records(arguments.file)
    if not len(records):
        raise ValueError(f"{records.path} holds no record")
    find = ImageFolder(arguments.image_folder, None).find if arguments.image_folder else lambda name: None
    checked = check_records(records, kind_of(records), find, progress(f"checking {records.path.name}", "records"))
    print_table([TABLE, describe(records)])
    print(f"\nno fault in {len(records):,} records; {checked.duplicates:,} have the id of an earlier one")


# ----------------------------------------------------------------------------------------------- cache


def cache(arguments):
    """Every image of the records as a frame in one file, see `data.ImageCache`.

    Frames are appended in the order of their names. The lines of the index follow when the frames they speak of are on
    the disk, in a file that takes the index's place at the end: whenever this is killed, the next run goes on behind
    the last such line, to the same bytes. Images that a finished cache lacks are appended in the same way.
    """
    config = pixels_of(checkpoint.locate(arguments.model), arguments.pad)
    images = ImageFolder(arguments.image_folder, config)
    wanted = set()
    for records in map(Records, arguments.records):
        for number, record in enumerate(records):
            try:
                wanted.update(image_names(record))
            except ValueError as error:
                raise ValueError(f"{records.place(number)}: {error}") from None

    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    index, growing = out / INDEX, out / f".{INDEX}.growing"
    begin = time.monotonic()
    with open(out / FRAMES, "ab") as frames:
        try:
            fcntl.lockf(frames, fcntl.LOCK_EX | fcntl.LOCK_NB)  # goes with this process, however it ends
        except OSError:
            raise ValueError(f"{out} is being written by another process: wait for it, or use another --out") from None
        stored = next((path.read_bytes() for path in (growing, index) if path.exists()), b"")
        stored = stored[: stored.rfind(b"\n") + 1] or _line(cache_settings(config))  # a last line may be torn
        entries = parse_index(stored, config, index)
        end = sum(entry["channels"] for entry in entries) * config.crop**2
        if os.fstat(frames.fileno()).st_size < end:
            raise ValueError(f"{out / FRAMES} is shorter than its index says: delete {out} and make it again")
        absent = sorted(wanted - {entry["image"] for entry in entries})
        try:
            with atomic(growing, "wb") as file:
                file.write(stored)
            frames.truncate(end)
            with open(growing, "ab") as file:
                skipped = append(absent, images, frames, file, arguments.workers)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
                raise
            raise OSError(f"{out}: {error.strerror}: make room and run this again, what is done is kept") from None
        os.replace(growing, index)

    entries = parse_index(index.read_bytes(), config, index)
    for name, reason in list(skipped.items())[:20]:
        print(f"skipped {name}: {reason}", file=sys.stderr)
    channels = Counter(entry["channels"] for entry in entries)
    print_table({
        "images": len(entries),
        "of one channel": channels[1],
        "of three channels": channels[3],
        "there before": len(entries) - len(absent) + len(skipped),
        "skipped, no file": sum(reason.startswith("no image") for reason in skipped.values()),
        "skipped, other reasons": sum(not reason.startswith("no image") for reason in skipped.values()),
        "bytes": (out / FRAMES).stat().st_size,
        "seconds": round(time.monotonic() - begin),
    }.items())  # fmt: skip


def pixels_of(source: checkpoint.Source, pad: str) -> PixelConfig:
    """How an encoder, or the encoder of a checkpoint, is shown images; no weights are looked for."""
    folder = source.folder
    if not (folder / "preprocessor_config.json").exists():
        config = read_json(folder / "config.json")
        if config.get("mm_vision_tower_config"):  # open_clip's, at this path or beside the checkpoint's own
            file = Path(folder, config["mm_vision_tower_config"])
            settings = read_json(file if file.is_file() else folder / file.name)
            return open_clip_pixels(settings["vision_cfg"]["image_size"], pad)
        if not config.get("mm_vision_tower"):
            raise ValueError(f"{folder} has no preprocessor_config.json and names no encoder: give the encoder")
        folder = checkpoint.locate(config["mm_vision_tower"], folder).folder
    return pixel_config(read_json(folder / "preprocessor_config.json"), folder, pad)


def append(names: list[str], images: ImageFolder, frames, index, workers: int) -> dict[str, str]:
    """Append the frames of the images, and lines about them to the index; the images that cannot be read, and why."""
    lines, skipped, flushed = [], {}, time.monotonic()
    show = progress("caching", "images")

    def flush():
        for file, data in ((frames, b""), (index, b"".join(lines))):  # a line is never on the disk before its frame
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        lines.clear()

    results = parallel(partial(_frame, images), names, workers)
    for number, (name, (channels, data)) in enumerate(zip(names, results, strict=True), 1):
        if channels:
            frames.write(data)
            lines.append(_line({"image": name, "channels": channels, "crc32": zlib.crc32(data)}))
        else:
            skipped[name] = data
        if number == len(names) or time.monotonic() - flushed > 0.25:  # seconds
            flush()
            flushed = time.monotonic()
        show(number, len(names))
    return skipped


def _line(entry: dict) -> bytes:
    return json.dumps(entry).encode() + b"\n"


def _frame(images: ImageFolder, name: str) -> tuple[int, bytes | str]:
    """Channels and bytes of a frame; 0 and the reason where there is none."""
    try:
        frame = images.frame(name)
    except (ValueError, OSError) as error:
        return 0, str(error)
    grey = (frame == frame[..., :1]).all()
    return (1, frame[..., 0].tobytes()) if grey else (3, frame.tobytes())


COMMANDS = {"phantom": make_phantom, "mimic-cxr": mimic_cxr, "diff-vqa": diff_vqa, "cxr-vqa": cxr_vqa, "rrg": rrg,
            "check": check, "cache": cache}  # fmt: skip


def main(arguments) -> int:
    return guard("prepare.py", COMMANDS[arguments.command], arguments)


if __name__ == "__main__":
    sys.exit(main(ARGUMENTS))
