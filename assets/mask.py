"""Draws mask.svg: what a row with a shared prefix lets see, from the mask function that attention uses.

    python assets/mask.py
"""

import sys
from itertools import groupby
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from attention import visible

SMALL = [0] * 8 + [1] * 4 + [2] * 3 + [3] * 5 + [-1] * 2
REAL = [0] * 1404 + [1] * 90 + [2] * 45 + [3] * 130 + [4] * 75  # prompt and image, four questions with their answers
BLOCK = 64
INK, PALE, PREFIX, OWN, MIXED, PADDING = "#222222", "#eceff1", "#5b8fc0", "#d98a2b", "#4f9d69", "#b8bec4"


def cells(colours, x, y, size):
    """Squares [rows][columns] of colours; neighbours of one colour in a row are one rectangle, with gaps drawn over."""
    for row, line in enumerate(colours):
        column = 0
        for colour, run in groupby(line):
            width = len(list(run))
            yield (f'<rect x="{x + column * size}" y="{y + row * size}" width="{width * size}" height="{size}" '
                   f'fill="{colour}"/>')  # fmt: skip
            column += width
    n, m = len(colours), len(colours[0])
    lines = "".join(f"M{x} {y + k * size}h{m * size}" for k in range(n + 1))
    lines += "".join(f"M{x + k * size} {y}v{n * size}" for k in range(m + 1))
    yield f'<path d="{lines}" stroke="#ffffff" stroke-width="1"/>'


def text(x, y, words, anchor="middle", size=12, more=""):
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="{size}" {more}>{words}</text>'


def legend(x, y, entries):
    for colour, words in entries:
        yield f'<rect x="{x}" y="{y - 11}" width="13" height="13" fill="{colour}"/>'
        yield text(x + 20, y, words, "start")
        y += 20


def small(x, y, size):
    """The rule, position by position."""
    seen = visible(torch.tensor([SMALL]), len(SMALL), len(SMALL))[0, 0].tolist()
    colour = lambda i, j: (PREFIX if SMALL[j] == 0 else OWN) if seen[i][j] else PALE
    yield from cells([[colour(i, j) for j in range(len(SMALL))] for i in range(len(SMALL))], x, y, size)
    begin = 0
    for segment, run in groupby(SMALL):
        length = len(list(run))
        name = {0: "prefix", -1: "padding"}.get(segment, f"question {segment}")
        near, middle, end = begin * size, (begin + length / 2) * size, (begin + length) * size
        colour = {0: PREFIX, -1: PADDING}.get(segment, OWN)
        yield f'<path d="M{x + near + 2} {y - 6}H{x + end - 2}M{x - 6} {y + near + 2}V{y + end - 2}" stroke="{colour}" stroke-width="4"/>'  # noqa: E501
        yield text(x - 14, y + middle + 4, name, "end")
        yield text(x + middle, y - 14, segment if segment >= 0 else "−1")
        begin += length
    yield text(x - 14, y - 14, "segment", "end")


def real(x, y, size):
    """A row of real size, in the kernel's blocks, and how many of them it computes."""
    T = len(REAL)
    seen = visible(torch.tensor([REAL]), T, T)[0, 0]
    kind = lambda block: PREFIX if block.all() else MIXED if block.any() else PALE
    blocks = [[kind(part) for part in rows.split(BLOCK, 1)] for rows in seen.split(BLOCK)]
    yield from cells(blocks, x, y, size)
    edge = x + (REAL.count(0) / BLOCK) * size
    yield f'<path d="M{edge} {y - 8}V{y + len(blocks) * size}" stroke="{INK}" stroke-width="1" stroke-dasharray="3 3"/>'
    yield text((x + edge) / 2, y - 14, "prefix: prompt and image, 1,404 positions")
    yield text((edge + x + len(blocks) * size) / 2, y - 14, "4 questions")
    found = [colour for line in blocks for colour in line]
    share = lambda colour: f"{found.count(colour) / len(found):.0%} of the blocks"
    yield from legend(x + 2, y + len(blocks) * size + 24, [
        (PREFIX, f"all visible: computed without a mask, {share(PREFIX)}"),
        (MIXED, f"some visible: computed with it, {share(MIXED)}"),
        (PALE, f"nothing visible: skipped, {share(PALE)}"),
    ])  # fmt: skip


def draw() -> str:
    size, width = 17, 960
    edge = len(SMALL) * size
    parts = [
        text(287, 34, "Who sees whom (a row across: one query)", size=14, more='font-weight="bold"'),
        *small(100, 76, size),
        *legend(102, 76 + edge + 24, [
            (PREFIX, "seen: the prefix, by everybody behind it"),
            (OWN, "seen: one’s own question and answer, up to oneself"),
            (PALE, "hidden: what comes later, the other questions, padding"),
        ]),
        text(734, 34, f"The same mask in blocks of {BLOCK} × {BLOCK}", size=14, more='font-weight="bold"'),
        *real(545, 76, 13.5),
    ]  # fmt: skip
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} 540" font-family="Helvetica, sans-serif">
<title>The mask of a row whose questions share a prefix</title>
<rect width="{width}" height="540" rx="8" fill="#ffffff"/>
<g fill="{INK}">
{chr(10).join(parts)}
</g>
</svg>
"""


if __name__ == "__main__":
    Path(__file__).with_name("mask.svg").write_text(draw())
