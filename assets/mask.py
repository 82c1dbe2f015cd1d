"""Draw mask.svg: what the positions of a row with a shared prefix see, according to attention.visible.

    python assets/mask.py
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from attention import visible

# the segments of two rows; the second is of real size: prompt and image, four questions with their answers
SMALL = torch.tensor([0] * 8 + [1] * 4 + [2] * 3 + [3] * 5 + [-1] * 2)
REAL = torch.tensor([0] * 1404 + [1] * 90 + [2] * 45 + [3] * 130 + [4] * 75)
PALE, PREFIX, OWN, MIXED = "#eceff1", "#5b8fc0", "#d98a2b", "#4f9d69"
TOP = 76  # where both grids begin


def text(x, y, words, anchor="middle", size=12):
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-size="{size}">{words}</text>'


def squares(places, size, colour):
    """A square at each (x, y); the white stroke separates neighbours."""
    path = "".join(f"M{x:g} {y:g}h{size}v{size}h-{size}z" for x, y in places)
    return f'<path d="{path}" fill="{colour}" stroke="#ffffff"/>'


def panel(x, size, title, layers):
    """A grid under its title and above its legend. layers: (where [n, n], colour, meaning) of each kind of cell."""
    n = len(layers[0][0])
    yield text(x + n * size / 2, 30, title, size=15)
    for number, (where, colour, meaning) in enumerate(layers):
        places = [(x + j * size, TOP + i * size) for i, j in where.nonzero().tolist()]
        yield squares(places, size, colour)
        y = TOP + n * size + 14 + 20 * number
        yield squares([(x, y)], 14, colour)
        yield text(x + 20, y + 11, meaning, "start")


def draw_rule(x, size):
    """A small row, position by position."""
    seen = visible(SMALL[None], len(SMALL), len(SMALL))[0, 0]
    prefix = SMALL == 0
    yield from panel(x, size, "Who sees whom (each row is one query)", [
        (seen & prefix, PREFIX, "visible: the prefix, to everybody behind it"),
        (seen & ~prefix, OWN, "visible: one’s own question and answer up to this position"),
        (~seen, PALE, "hidden: later positions, other questions, padding"),
    ])  # fmt: skip
    # on top the number of each segment, on the left its name
    yield text(x - 8, TOP - 10, "segment", "end")
    for segment, name in {0: "prefix", 1: "question 1", 2: "question 2", 3: "question 3", -1: "padding"}.items():
        middle = (segment == SMALL).nonzero().float().mean() * size
        yield text(x + middle + size / 2, TOP - 10, segment)
        yield text(x - 8, TOP + middle + size / 2 + 4, name, "end")


def draw_blocks(x, size):
    """A row of real size in blocks of 64 × 64, as in the kernel, and how many of them it computes."""
    seen = visible(REAL[None], len(REAL), len(REAL)).float()
    # the share of visible pairs in each block; the last block is cut off
    shares = F.avg_pool2d(seen, 64, ceil_mode=True)[0, 0]
    full, mixed, hidden = shares == 1, (shares > 0) & (shares < 1), shares == 0
    percent = lambda where: f"{where.float().mean():.0%} of the blocks"
    yield from panel(x, size, "The same mask in blocks of 64 × 64", [
        (full, PREFIX, f"all visible: computed without a mask, {percent(full)}"),
        (mixed, MIXED, f"some visible: computed under the mask, {percent(mixed)}"),
        (hidden, PALE, f"nothing visible: skipped, {percent(hidden)}"),
    ])  # fmt: skip
    edge = 1404 / 64 * size
    yield f'<path d="M{x + edge} {TOP - 8}v{len(full) * size + 8}" stroke="#222222" stroke-dasharray="3 3"/>'
    yield text(x + edge / 2, TOP - 10, "prefix: prompt and image, 1,404 positions")
    yield text(x + edge + 40, TOP - 10, "4 questions")


def draw() -> str:
    shapes = "\n".join([*draw_rule(100, 17), *draw_blocks(545, 13.5)])
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 960 540" font-family="Helvetica" fill="#222222">
<title>The mask of a row whose questions share a prefix</title>
<rect width="960" height="540" rx="8" fill="#ffffff"/>
{shapes}
</svg>
"""


if __name__ == "__main__":
    Path(__file__).with_name("mask.svg").write_text(draw())
