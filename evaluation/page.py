"""Scores and studies -> one self-contained HTML page: opens from disk, asks no network, shows all text as text.

The data is one JSON island; the script makes every node with textContent, and a study's only when it comes into view.
"""

import base64
import html
import io
import json
import warnings
from pathlib import Path

from PIL import Image

from plumbing.files import atomic
from plumbing.image import load_image

SIDE = 224  # pixels of a thumbnail's longer side: some 6 kB each


def thumbnail(path: Path) -> str:
    """An image file -> a small grey JPEG as a data URI."""
    source = path
    if path.suffix.lower() in (".jpg", ".jpeg") and path.is_file():
        source = Image.open(path)
        source.draft("L", (2 * SIDE, 2 * SIDE))  # decodes at an eighth where that is enough: ten times faster
    image = load_image(source).convert("L")
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS, reducing_gap=2.0)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=70, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def thumbnails(paths, folder, show=lambda *_: None) -> dict[str, str]:
    """{path: data URI} of those that can be read; one warning counts the others."""
    found, failed, paths = {}, [], sorted(set(paths))
    for i, path in enumerate(paths, 1):
        try:
            found[path] = thumbnail(Path(folder) / path)
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            failed.append(f"{path}: {error}")
        show(i, len(paths))
    if failed:
        counts = f"{len(failed):,} of {len(paths):,} images are not on the page"
        warnings.warn(f"{counts} (first: {failed[0]})", stacklevel=2)
    return found


def write(path, title, subtitle, groups, scores, metrics, studies, words, folder=None, show=lambda *_: None):
    """Write the page.

    groups: {name: number of studies}; scores: a list of {"key", "note", "values": {group: [value, low, high]}};
    metrics: names of the studies' values; studies: a list of {"id", "prior": has one, "prompt", "reference",
    "prediction", "images": paths, "values"}; words: those of change; folder: where the paths begin, None: no images.
    """
    wanted = [image for study in studies for image in study["images"]] if folder is not None else []
    images = thumbnails(wanted, folder, show)
    places = {image: i for i, image in enumerate(images)}
    data = {
        "groups": groups, "scores": scores, "metrics": metrics, "words": words, "images": list(images.values()),
        "studies": [study | {"images": [places.get(image) for image in study["images"]]} for study in studies],
    }  # fmt: skip
    island = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")  # no tag can begin
    page = PAGE.replace("<!--TITLE-->", html.escape(title)).replace("<!--SUBTITLE-->", html.escape(subtitle))
    with atomic(path) as file:
        file.write(page.replace("<!--DATA-->", island))


PAGE = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
