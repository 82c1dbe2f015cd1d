"""The published evaluation set, X-iZhang/MIMIC-CXR-RRG on the Hugging Face hub -> a question file and its images."""

import hashlib
import io
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from plumbing.cli import progress
from plumbing.files import atomic
from sources.inputs import one_line, require
from sources.outputs import Example, announce, finish, missing, plan, writer

IMAGES = ("main_image", "prior_image")  # columns


class Published(NamedTuple):
    """The rows of a data set as dicts whose images are undecoded. total: their number, or 0 if it is not known."""

    rows: Iterable[dict]
    total: int


def prepare_rrg(out, source: str, configuration: str, split: str, reference: str | None = None):
    """Write OUT/CONFIGURATION_SPLIT_questions.jsonl, and into OUT/images the images it names.

    reference is the column of the true text; the questions have no reference without it.
    """
    out, skipped = Path(out), Counter()
    outputs = plan(out, [configuration], {split: ("questions",)})
    announce(outputs)
    if missing(outputs):
        columns = [*IMAGES, "default_prompt"]
        if reference:
            columns.append(reference)
        published = read_published(source, configuration, split, columns)
        show = progress(f"{configuration} {split}", "studies")
        with writer(outputs) as write:
            for number, row in enumerate(published.rows):
                images = save_images(out, row, source)
                if images:
                    answer = one_line(row[reference] or "") if reference else None
                    name = f"{configuration}_{split}_{number}"
                    question = row["default_prompt"]
                    write(Example(configuration, split, name, images, question=question, answer=answer))
                else:
                    skipped["rows whose image is missing or cannot be read"] += 1
                show(number + 1, max(published.total, number + 1))
    finish(outputs, skipped)


def read_published(source: str, configuration: str, split: str, columns: list[str]) -> Published:
    """Open a data set from the hub, or from a folder of parquet files, without loading it.

    Raises ValueError if the package `datasets`, a file of the split or one of the columns is missing.
    """
    try:
        import datasets
        from pyarrow import parquet
    except ImportError:
        raise ValueError("this data set needs another package: pip install datasets") from None

    if Path(source).is_dir():
        # a copy of the hub's repository has a folder for each configuration
        folders = Path(source, configuration), Path(source)
        files = sorted(folders[0].glob(f"{split}*.parquet")) or sorted(folders[1].glob(f"{split}*.parquet"))
        if not files:
            raise ValueError(f"no {split}*.parquet in {folders[1]} or {folders[0]}: check --source and --split")
        names = [str(file) for file in files]
        rows = datasets.load_dataset("parquet", data_files=names, split="train", streaming=True)
        total = sum(parquet.read_metadata(file).num_rows for file in files)
    else:
        rows = datasets.load_dataset(source, configuration, split=split, streaming=True)
        splits = rows.info.splits or {}
        total = splits[split].num_examples if split in splits else 0

    require(columns, rows.column_names or next(iter(rows)), source)
    for column in IMAGES:
        rows = rows.cast_column(column, datasets.Image(decode=False))
    return Published(rows, total)


def save_images(out: Path, row: dict, source: str) -> list[str]:
    """Save a row's images. Returns [current, prior], [current] without a prior, or [] if one cannot be read."""
    try:
        current, prior = (save_image(out, row[column], source) for column in IMAGES)
    except (OSError, Image.DecompressionBombError):
        return []
    if not current:
        return []
    # a study without a prior has its current image again as a dummy
    return [current, prior] if prior and prior != current else [current]


def save_image(out: Path, image: dict | None, source: str) -> str | None:
    """{"bytes", "path"} -> images/HASH.SUFFIX under `out`. Equal images share a file. Raises OSError if it is none."""
    if image is None:
        return None
    data = image["bytes"] or Path(source, image["path"]).read_bytes()
    suffix = Image.open(io.BytesIO(data)).format.lower()
    if suffix == "jpeg":
        suffix = "jpg"
    name = f"images/{hashlib.sha256(data).hexdigest()[:32]}.{suffix}"
    if not (out / name).exists():
        (out / "images").mkdir(parents=True, exist_ok=True)
        with atomic(out / name, "wb") as file:
            file.write(data)
    return name
