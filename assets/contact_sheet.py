"""The contact sheet of a drawn hospital: images above their reports, in which words of change are coloured."""

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

from phantom.history import DEVICES, VOCABULARY, State, history, picture
from phantom.reports import report

INK, PAPER, FAINT = "#e6e8ea", "#14171a", "#8b949e"
COLOURS = {
    "new": "#f0b849", "worse": "#ff7b72", "unchanged": "#79b8ff", "improved": "#7ee787", "resolved": "#7ee787",
    "removed": "#d2a8ff",
}  # fmt: skip


def choose(seed: int, patients: int, studies: int) -> list[list[State]]:
    """The first studies of patients who together show as many findings and changes as possible, chosen greedily."""
    pool = []
    for patient in range(100 * patients):
        states = history(seed, patient)
        if len(states) >= studies:
            pool.append(states[:studies])

    def kinds(states):
        for state in states:
            for name in state.present | state.gone:
                yield from (name, (name in DEVICES, state.changes.get(name)))

    shown, rows = set(), []
    while pool and len(rows) < patients:
        best = max(pool, key=lambda states: len(set(kinds(states)) - shown))
        shown.update(kinds(best))
        pool.remove(best)
        rows.append(best)
    return rows


def draw(seed: int = 0, patients: int = 3, studies: int = 4, size: int = 320) -> Image.Image:
    """A row for each patient, a column for each study. `size` is the side of an image in pixels."""
    unit = size / 20
    small, text = ImageFont.load_default(0.85 * unit), ImageFont.load_default(0.95 * unit)
    gap, line = round(1.2 * unit), round(1.3 * unit)

    # 1) lay the texts out: they set the height of a row
    rows = choose(seed, patients, studies)
    cells, heights = [], []
    for states in rows:
        findings = [report(state).split(" FINDINGS:")[1].split(" IMPRESSION:")[0] for state in states]
        cells.append([paragraph(words, text, size) for words in findings])
        heights.append(round(size + line * (4.4 + max(map(len, cells[-1])))))

    # 2) draw row by row
    sheet = Image.new("RGB", (gap + studies * (size + gap), sum(heights) + gap), PAPER)
    pen, top = ImageDraw.Draw(sheet), gap
    for states, row, height in zip(rows, cells, heights, strict=True):
        title = f"Patient {states[0].subject_id}"
        pen.text((gap, top), title, INK, text)
        left = gap + text.getlength(title) + unit / 2
        pen.text((left, top), f"a {states[0].anatomy.sex}, {len(states)} studies", FAINT, text)
        for column, (state, lines) in enumerate(zip(states, row, strict=True)):
            x, y = gap + column * (size + gap), top + 1.6 * line
            when = "first study"
            if state.prior:
                days = (state.date - state.prior.date).days
                when = "1 day later" if days == 1 else f"{days} days later"
            pen.text((x, y), f"{state.view}, {when}", FAINT, small)
            y += 1.1 * line
            sheet.paste(Image.fromarray(picture(state, state.view, size)), (x, round(y)))
            y += size + 0.4 * line
            write_lines(pen, (x, y), lines, text, line)
        top += height
    return sheet


def paragraph(text: str, font, width: float) -> list[list[str]]:
    """Break a text into lines of words that are at most `width` pixels wide."""
    lines = [[]]
    for word in text.split():
        if font.getlength(" ".join([*lines[-1], word])) > width:
            lines.append([])
        lines[-1].append(word)
    return lines


def write_lines(pen, corner: tuple[float, float], lines, font, height: float) -> float:
    """Write lines of words, words of change in their colours, and return y of the line below."""
    left, y = corner
    for words in lines:
        x = left
        for word in words:
            stem = word.rstrip(".")
            change = VOCABULARY["changes"].get(stem.lower())
            pen.text((x, y), stem, COLOURS.get(change, INK), font)
            pen.text((x + font.getlength(stem), y), word[len(stem) :], INK, font)
            x += font.getlength(word + " ")
        y += height
    return y


def few_colours(sheet: Image.Image) -> Image.Image:
    """Reduce a sheet to 40 greys and six shades of each colour: half the bytes as PNG, without a visible loss."""
    shades = list(np.linspace(0, 255, 40).repeat(3).reshape(-1, 3))
    paper = np.array(ImageColor.getrgb(PAPER))
    for colour in (INK, FAINT, *dict.fromkeys(COLOURS.values())):
        ink = np.array(ImageColor.getrgb(colour))
        for share in np.linspace(0, 1, 6):
            shades.append((1 - share) * paper + share * ink)
    palette = Image.new("P", (1, 1))
    palette.putpalette(np.concatenate(shades).round().astype(np.uint8).tobytes())
    return sheet.quantize(palette=palette, dither=Image.Dither.NONE)
