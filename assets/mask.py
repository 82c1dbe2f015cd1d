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
NAMES = {0: "prefix", 1: "question 1", 2: "question 2", 3: "question 3", -1: "padding"}
PALE, PREFIX, OWN, MIXED = "#eceff1", "#5b8fc0", "#d98a2b", "#4f9d69"
TOP = 76  # where both grids begin


def text(x, y, words, anchor="middle"):
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}">{words}</text>'


def squares(corners, size, colour):
    """One square at each (x, y); the white stroke separates neighbours."""
    path = "".join(f"M{x:g} {y:g}h{size}v{size}h-{size}z" for x, y in corners)
    return f'<path d="{path}" fill="{colour}" stroke="#ffffff"/>'


def draw_grid(x, size, title, layers):
    """A grid under its title and above its legend. layers: colour -> (where [n, n], meaning) of a kind of cell."""
    yield text(x + 188, 30, title)
    y = 464
    for colour, (where, meaning) in layers.items():
        # the cells, then their line of the legend
        corners = torch.tensor([x, TOP]) + size * where.nonzero().flip(1)
        yield squares(corners.tolist(), size, colour)
        yield squares([(x, y)], 14, colour)
        yield text(x + 20, y + 11, meaning, "start")
        y += 20


def draw_rule(x=100, size=17):
    """A small row, position by position."""
    seen = visible(SMALL[None], len(SMALL), len(SMALL))[0, 0]
    prefix = SMALL == 0
    layers = {
        PREFIX: (seen & prefix, "visible: the prefix, to everybody after it"),
        OWN: (seen & ~prefix, "visible: one’s own question and answer up to this position"),
        PALE: (~seen, "hidden: later positions, other questions, padding"),
    }
    yield from draw_grid(x, size, "Who sees whom (a row is one query; on top, the segments)", layers)
    # the number of each segment is on top, its name on the left
    for segment, name in NAMES.items():
        middle = size / 2 + size * (segment == SMALL).nonzero().float().mean()
        yield text(x + middle, TOP - 10, segment)
        yield text(x - 8, TOP + middle + 4, name, "end")


def draw_blocks(x=545, size=13.5):
    """A row of real size in blocks of 64 × 64, as in the kernel, and how many of them it computes."""
    seen = visible(REAL[None], len(REAL), len(REAL)).float()
    # the share of visible pairs in each block; the last block is cut off
    shares = F.avg_pool2d(seen, 64, ceil_mode=True)[0, 0]
    full, hidden = shares == 1, shares == 0
    mixed = ~(full | hidden)
    percent = lambda where: f"{where.float().mean():.0%} of the blocks"
    layers = {
        PREFIX: (full, f"all visible: computed without a mask, {percent(full)}"),
        MIXED: (mixed, f"some visible: computed under the mask, {percent(mixed)}"),
        PALE: (hidden, f"nothing visible: skipped, {percent(hidden)}"),
    }
    yield from draw_grid(x, size, "The same mask in blocks of 64 × 64", layers)
    # one square is 64 positions: the prefix is 22 of them wide
    yield text(x + 22 * size, TOP - 10, "prefix: prompt and image, 1,404 positions ↓", "end")
    yield text(x + 22 * size + 8, TOP - 10, "4 questions", "start")


def draw() -> str:
    shapes = "\n".join([*draw_rule(), *draw_blocks()])
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 960 540" font-family="Helvetica" font-size="12">
<title>The mask of a row whose questions share a prefix</title>
<rect width="960" height="540" rx="8" fill="#ffffff"/>
{shapes}
</svg>
"""


if __name__ == "__main__":
    Path(__file__).with_name("mask.svg").write_text(draw())
