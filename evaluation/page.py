"""Scores and studies -> one self-contained HTML page: it opens from disk, makes no request, and shows text as text.

page.html holds everything but the data, which is put in as one JSON text. Its script makes every node with textContent,
and a study's nodes only when it comes into view.
"""

import base64
import html
import io
import json
import warnings
from pathlib import Path

from PIL import Image

from data import ImageFolder
from evaluation.metrics import FLOOR, WORDS_OF_CHANGE, score_of
from plumbing.cli import progress
from plumbing.files import atomic
from plumbing.image import load_image

START = "<!doctype html>"  # of page.html
SIDE = 224  # pixels of a thumbnail's longer side: some 6 kB each


def thumbnail(path: Path) -> str:
    """An image file -> a small grey JPEG as a data URI."""
    source = path
    if path.suffix.lower() in (".jpg", ".jpeg") and path.is_file():
        # let the JPEG decoder scale down where it can: ten times faster
        source = Image.open(path, formats=("JPEG",))
        source.draft("L", (2 * SIDE, 2 * SIDE))
    image = load_image(source).convert("L")
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS, reducing_gap=2.0)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=70, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def thumbnails(names: list[str], folder) -> dict[str, str]:
    """{name: data URI} of the images in a folder that can be read; one warning counts the others."""
    images, failures, show = {}, [], progress("thumbnails")
    folder = ImageFolder(folder, None)
    for number, name in enumerate(names, 1):
        try:
            images[name] = thumbnail(Path(folder.find(name)))
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            failures.append(f"{name}: {error}")
        show(number, len(names))
    if failures:
        count = f"{len(failures):,} of {len(names):,} images are not on the page"
        warnings.warn(f"{count} (first: {failures[0]})", stacklevel=2)
    return images


def write(path, *, title, subtitle, groups, scores, notes, pairs, table, folder=None):
    """Writes the page.

    groups: {name: number of studies}; scores: {key: {group: Interval}}; notes: {key: what the score is};
    table: {key: [N, k]}, rows of the N `Pair`s as in `metrics`; folder: where the images are, None for none.
    """
    # 1) every image once; a study names its images by their numbers
    images = {}
    if folder is not None:
        images = thumbnails(sorted({name for pair in pairs for name in pair.images}), folder)
    numbers = {name: number for number, name in enumerate(images)}

    # 2) what the script of page.html reads
    lines = []
    for key, found in scores.items():
        note = notes.get(key, "")
        ends = {group: list(vars(interval).values()) for group, interval in found.items()}
        lines.append({"key": key, "note": note, "values": ends})
    # hits and chances [N, 2] make no score of a single study, the floor none of the study's own
    values = {key: score_of(rows, 1) for key, rows in table.items() if rows.shape[1] != 2 and key != FLOOR}
    studies = []
    for i, pair in enumerate(pairs):
        study = {
            "id": pair.id,
            "prior": pair.has_prior,
            "prompt": pair.prompt,
            "reference": pair.reference,
            "prediction": pair.prediction,
            "images": [numbers.get(name) for name in pair.images],
            "values": [round(float(column[i]), 2) for column in values.values()],
        }
        studies.append(study)
    data = {
        "groups": groups,
        "scores": lines,
        "metrics": list(values),
        "words": sorted(WORDS_OF_CHANGE),
        "images": list(images.values()),
        "studies": studies,
    }
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))

    # 3) the page
    page = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    page = page.replace("<!--TITLE-->", html.escape(title))
    page = page.replace("<!--SUBTITLE-->", html.escape(subtitle))
    # without "<" no text can begin a tag; the data comes last, so that nothing in it is replaced
    page = page.replace("<!--DATA-->", text.replace("<", "\\u003c"))
    with atomic(path) as file:
        file.write(page)
