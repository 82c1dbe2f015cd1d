"""The published evaluation set, X-iZhang/MIMIC-CXR-RRG on the Hugging Face hub -> a question file and its images."""

import hashlib
import io
from collections import Counter
from pathlib import Path

from PIL import Image

from data import ImageFolder
from plumbing.files import atomic
from sources.records import one_line, plan, require, writer

COLUMNS = ("main_image", "prior_image", "default_prompt")


def prepare_rrg(out, source: str, configuration: str, split: str, reference: str | None = None):
    """One question for each row. reference: the column of the true text; by default the configuration's own name."""
    out, skipped = Path(out), Counter()
    outputs, name = plan(out, [configuration], {split: ["_questions"]}), f"{configuration}_{split}"
    if all(path.exists() for path in outputs):
        return outputs, {}, {}
    columns = [*COLUMNS, reference] if reference else COLUMNS
    seen, reference = set(), reference or configuration
    with writer(outputs) as write:
        for number, row in enumerate(published_rows(source, configuration, split, columns)):
            # 1) its texts; there may be no reference
            answer = None
            if not isinstance(row["default_prompt"], str):
                skipped["rows whose default_prompt is no text"] += 1
                continue
            if reference not in row:
                skipped[f"questions without a reference, since the set has no column {reference}: see --reference"] += 1
            elif isinstance(row[reference], str | None):
                answer = one_line(row[reference] or "")
            else:
                skipped[f"rows whose {reference} is no text"] += 1
                continue

            # 2) its images; a study without a prior may name its current image again
            try:
                current = save_image(out, row["main_image"], source)
                prior = save_image(out, row["prior_image"], source)
                if not current:
                    raise OSError
            except (OSError, ValueError, Image.DecompressionBombError):
                skipped["rows whose image is missing or cannot be read"] += 1
                continue
            images = [current] if prior in ("", current) else [current, prior]

            # 3) the ids of MIMIC-CXR, if the set has them; an image's is more exact than its study's
            ids = {column: id_of(row[column]) for column in ("dicom_id", "study_id") if id_of(row.get(column))}
            id = next(iter(ids.values()), f"{name}_{number}")
            if id in seen:
                id = f"{id}_{number}"
            seen.add(id)
            write(name, id, images, question=row["default_prompt"], answer=answer, **ids)
    return outputs, skipped, {}


def id_of(value) -> str:
    """An id as text; "" if it is none. pandas writes 50414267.0 where other rows have no id."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value) if isinstance(value, str | int) else ""


def published_rows(source: str, configuration: str, split: str, columns):
    """Rows as dicts with undecoded images, from the hub or from a folder of parquet files, read as they are needed.

    Raises ValueError if the package `datasets`, a file of the split or a column is missing.
    """
    try:
        import datasets
        from tqdm import tqdm
    except ImportError:
        raise ValueError("this data set needs another package: pip install datasets") from None
    # its lines beside ours
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    if Path(source).is_dir():
        # a copy of the hub's repository has a folder for each configuration
        pattern = f"{split}*.parquet"
        files = sorted(Path(source, configuration).glob(pattern)) or sorted(Path(source).glob(pattern))
        if not files:
            raise ValueError(f"no {split}*.parquet in {source} or its {configuration}: check --source and --split")
        files = {"train": [str(file) for file in files]}
        rows = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
    else:
        rows = datasets.load_dataset(source, configuration, split=split, streaming=True)
    require(columns, rows.column_names or next(iter(rows)), source)
    for column in ("main_image", "prior_image"):
        rows = rows.cast_column(column, datasets.Image(decode=False))
    return readable(tqdm(rows, f"{configuration} {split}", unit=" studies", disable=None), source)


def readable(rows, source: str):
    """The same rows. ValueError if they cannot be read: pyarrow, `datasets` and the hub raise errors of their own."""
    try:
        yield from rows
    except Exception as error:
        raise ValueError(f"{source} cannot be read ({error}): check it, or fetch it again") from None


def save_image(out: Path, image: dict | None, source: str) -> str:
    """{"bytes", "path"} -> images/HASH.SUFFIX under `out`; "" without an image. Raises OSError if it cannot be read."""
    # a row without an image may hold an empty one
    if image is None or not (image["bytes"] or image["path"]):
        return ""
    # a row may name a file of the set's own folder instead of holding it
    data = image["bytes"] or Path(ImageFolder(source, None).find(image["path"])).read_bytes()
    suffix = Image.open(io.BytesIO(data)).format.lower().replace("jpeg", "jpg")
    path = f"images/{hashlib.sha256(data).hexdigest()[:32]}.{suffix}"
    if not (out / path).exists():
        (out / "images").mkdir(parents=True, exist_ok=True)
        with atomic(out / path, "wb") as file:
            file.write(data)
    return path
