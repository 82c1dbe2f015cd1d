"""Raw data sets -> the record and question files that training and evaluation read.

    python prepare.py mimic-cxr --root mimic-cxr-jpg/2.0.0 --reports mimic-cxr-reports --out data

Every split becomes NAME_SPLIT.jsonl (training records: train, validate) and NAME_SPLIT_questions.jsonl (validate,
test), with one JSON object per line. Image paths begin with files/ and are relative to ROOT, which is therefore the
image folder of every later command. A file appears when it is complete, and an existing file is kept: run a command
again after an interruption, and it makes what is missing.
"""

if __name__ == "__main__":
    import plumbing.start  # noqa: F401 (first of all)


import argparse
import os
import sys
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import phantom.hospital as phantom
from data import ImageFolder, Records
from data import check as check_records
from plumbing.cli import Parser, guard, print_table, progress
from plumbing.files import atomic, only_writer_in
from sources.cache import build
from sources.mimic import CONTEXT, SECTIONS, prepare_sections
from sources.records import kind_of, summary
from sources.rrg import prepare_rrg
from sources.vqa import prepare_cxr_vqa, prepare_diff_vqa


def draw_hospital(out, patients: int, preview: bool, **settings):
    """Draw a synthetic hospital, laid out as MIMIC-CXR is, and print what is in it."""
    counts = phantom.write(out, patients, progress=progress("drawing", "patients"), **settings)
    if preview:
        with atomic(Path(out) / "preview.png", "wb") as file:
            file.write(phantom.encode(phantom.preview(settings["seed"], settings["aligned"]), "PNG", optimize=True))
    print_table(counts.items())


def check(file, image_folder=None, strict: bool = False):
    """Check every record of a file, and its images if their folder is given; say which records are odd.

    Raises ValueError with all problems if images are missing, if every record is odd, or if strict and one is.
    """
    records = Records(file)
    if not len(records):
        raise ValueError(f"{records.path} holds no record")
    find = ImageFolder(image_folder, None).find if image_folder else lambda name: None
    show = progress(f"checking {records.path.name}", "records")
    checked = check_records(records, kind_of(records), find, show, strict=strict)
    print_summaries([summary(records, checked.numbers)])
    head = f"{checked.odd:,} records are odd" if checked.odd else f"no problem in {len(records):,} records"
    print(f"\n{head}; {checked.duplicates:,} have the id of an earlier one")


def finish(outputs: list[Path], skipped: Counter, kinds: dict[str, Counter]):
    """Print what is in the files of a command, which may have existed, and what was left out of them.

    Raises ValueError if there is no file, because nothing in the input could be used.
    """
    # most frequent first
    reasons = sorted(((count, reason) for reason, count in skipped.items() if count), reverse=True)
    files = [Records(path) for path in outputs if path.exists()]
    if not files:
        listed = "; ".join(f"{count} {reason}" for count, reason in reasons)
        raise ValueError(f"no record could be made: {listed or 'the input is empty'}")
    # what the files hold, the kinds of questions in those that were made now, and what they do not hold
    print_summaries([summary(records, range(len(records))) for records in files])
    for column, counts in kinds.items():
        if counts:
            print(f"\n{column}: " + ", ".join(f"{kind} {count}" for kind, count in sorted(counts.items())))
    print("\nleft out or special in this run:" if reasons else "\nnothing was left out in this run")
    for count, reason in reasons:
        print(f"{count:>9}  {reason}")


def print_summaries(rows: list[dict[str, object]]):
    print_table([rows[0].keys(), *(row.values() for row in rows)])


# each function takes the flags of its command, by name
COMMANDS = {
    "phantom": draw_hospital,
    "mimic-cxr": prepare_sections,
    "diff-vqa": prepare_diff_vqa,
    "cxr-vqa": prepare_cxr_vqa,
    "rrg": prepare_rrg,
    "check": check,
    "cache": build,
}


def context_sections(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in CONTEXT:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(CONTEXT)}")
    # in the order of the published figure
    return [name for name in CONTEXT if name in names]


MOST_WORKERS = 512  # processes: more would wait for each other on any machine


def parse(arguments=None) -> argparse.Namespace:
    parser = Parser(prog="prepare.py", description="Raw data sets -> record and question files.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)

    def command(name: str, text: str, out: str):
        defaults = argparse.ArgumentDefaultsHelpFormatter
        add = commands.add_parser(name, help=text, description=text, formatter_class=defaults).add_argument
        # flags of several commands
        if out:
            add("--out", required=True, metavar="DIR", help=out)
        if name in ("phantom", "cache"):
            add("--workers", type=int, default=os.cpu_count(), metavar="N", help="number of worker processes")
        if name in ("mimic-cxr", "diff-vqa", "cxr-vqa"):
            add("--root", required=True, metavar="DIR", help="MIMIC-CXR: the folder that holds files/ and the metadata")
        return add

    add = command("phantom", "draw a small synthetic hospital, laid out as MIMIC-CXR is", "folder for the hospital")
    add("--patients", type=int, default=200, metavar="N", help="number of patients")
    add("--seed", type=int, default=0, metavar="S", help="random seed")
    add("--size", type=int, default=128, metavar="PX", help="height and width of the images in pixels")
    add("--dicom", action="store_true", help="also write DICOM files")
    text = "lay the images of a patient nearly on top of each other; if not given, they are shifted, turned, zoomed"
    add("--aligned", action="store_true", help=text)
    add("--preview", action="store_true", help="also draw some patients over time, in OUT/preview.png")

    out = "folder for the record and question files"
    add = command("mimic-cxr", "reports and metadata -> findings and impressions beside current and prior image", out)
    add("--reports", metavar="DIR", help="folder with files/pNN/pNNNNNNNN/sNNNNNNNN.txt; ROOT if not given")
    add("--section", default="both", choices=(*SECTIONS, "both"), help="what the model shall write from the images")
    text = "sections of the report that a question repeats as clinical context, with commas"
    add("--context", type=context_sections, default=",".join(CONTEXT), metavar="LIST", help=text)
    text = "no clinical context in questions; makes SECTION_no_context_SPLIT.jsonl"
    add("--no-context", action="store_true", help=text)
    text = "use the studies with a rule of their own, too; the published table of sections lacks them"
    add("--exceptions", action="store_true", help=text)

    add = command("diff-vqa", "MIMIC-Diff-VQA: questions about a study beside its reference study", out)
    add("--questions", required=True, metavar="CSV", help="mimic_pair_questions.csv, plain or gzip")
    text = "only questions of this question_type, such as difference; makes NAME_SPLIT.jsonl"
    add("--type", dest="question_type", metavar="NAME", help=text)

    add = command("cxr-vqa", "MIMIC-Ext-MIMIC-CXR-VQA: questions about one image", out)
    add("--questions", required=True, metavar="DIR", help="folder with train.json, valid.json and test.json")

    text = "the published evaluation set on the Hugging Face hub (needs: pip install datasets)"
    add = command("rrg", text, "folder for the question file and images/")
    add("--source", default="X-iZhang/MIMIC-CXR-RRG", metavar="ID_OR_DIR", help="hub id, or folder of parquet files")
    parts = ("findings_section", "impression_section")
    add("--configuration", default=parts[0], choices=parts, help="what the model shall write from the images")
    add("--split", default="test", metavar="NAME", help="split of the data set")
    add("--reference", metavar="COLUMN", help="column of the true text; default: the configuration's name")

    add = command("check", "check a JSON or JSONL file of your own, record by record", out="")
    add("file", metavar="FILE", help="training records or questions, in the published format")
    add("--image-folder", metavar="DIR", help="folder of the images; if not given, images are not looked for")
    add("--strict", action="store_true", help="refuse the file if a record is odd; else such records are counted")

    text = "pad, resize and crop every image once, so that training need not decode it again"
    add = command("cache", text, "folder of the cache, which is made, extended or resumed")
    add("--records", nargs="+", required=True, metavar="FILE", help="record or question files, JSON or JSONL")
    add("--image-folder", required=True, metavar="DIR", help="folder of the images that they name")
    add("--model", required=True, metavar="ID_OR_DIR", help="checkpoint or image encoder: a folder or a hub id")
    text = "how images become square: black borders as in training, mean colour as in inference, none crops"
    add("--pad", default="black", choices=("black", "mean", "none"), help=text)
    text = "show DICOM as the file says, or as MIMIC-CXR-JPG did; if not given, as the checkpoint was trained"
    add("--dicom-display", choices=("standard", "jpg"), help=text)

    parsed = parser.parse_args(arguments)
    if not 1 <= getattr(parsed, "workers", 1) <= MOST_WORKERS:
        parser.error(f"--workers {parsed.workers} is out of range: give 1 to {MOST_WORKERS}")
    return parsed


def main(arguments: argparse.Namespace) -> int:
    def run(flags: dict):
        # one process at a time makes files in a folder
        with only_writer_in(flags["out"]) if "out" in flags else nullcontext():
            made = COMMANDS[arguments.command](**flags)
        if made:
            finish(*made)

    flags = {name: value for name, value in vars(arguments).items() if name != "command"}
    return guard("prepare.py", run, flags)


if __name__ == "__main__":
    sys.exit(main(parse()))
