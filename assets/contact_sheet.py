"""The contact sheet of a drawn hospital: images above their reports, in which words of change are coloured."""

from PIL import Image, ImageDraw, ImageFont

from phantom.history import DEVICES, VOCABULARY, State, history, picture
from phantom.reports import report

INK, PAPER, FAINT = "#e6e8ea", "#14171a", "#8b949e"
COLOURS = {"new": "#f0b849", "worse": "#ff7b72", "unchanged": "#79b8ff", "removed": "#d2a8ff"}
COLOURS |= dict.fromkeys(("improved", "resolved"), "#7ee787")
PATIENTS, STUDIES, SIDE = 3, 4, 320  # rows, columns, side of an image in pixels
GAP, LINE = 19, 21  # between the columns, and from line to line
TEXT, SMALL = ImageFont.load_default(15.2), ImageFont.load_default(13.6)


def kinds(states: list[State]) -> set:
    """What these studies show: findings and devices, and the changes of either."""
    shown = set()
    for state in states:
        for name in state.present | state.gone:
            shown |= {name, (name in DEVICES, state.changes.get(name))}
    return shown


def choose(seed: int) -> list[list[State]]:
    """The first studies of patients who together show as much as possible, chosen greedily."""
    histories = [history(seed, patient) for patient in range(100 * PATIENTS)]
    pool = [states[:STUDIES] for states in histories if len(states) >= STUDIES]
    shown, rows = set(), []
    # each row is the patient who adds most to the rows above
    for _ in range(PATIENTS):
        rows.append(max(pool, key=lambda states: len(kinds(states) - shown)))
        shown |= kinds(rows[-1])
    return rows


def write(pen: ImageDraw.ImageDraw, corner: tuple[int, int], text: str, width: int) -> int:
    """Writes lines of at most `width` pixels, words of change in their colours. Returns y of the line below."""
    left, y = corner
    x = left
    for word in text.split():
        if x + TEXT.getlength(word) > left + width:
            x, y = left, y + LINE
        # "Worsened." is a word of change, too
        change = VOCABULARY["changes"].get(word.rstrip(".").lower())
        pen.text((x, y), word, COLOURS.get(change, INK), TEXT)
        x += TEXT.getlength(word + " ")
    return y + LINE


def few_greys(image: Image.Image) -> Image.Image:
    """Reduce an image to 37 greys, so that a palette of 256 has room for the colours of the words."""
    return image.point(lambda grey: (grey + 3) // 7 * 7)


def draw(seed: int = 0, aligned: bool = False) -> Image.Image:
    """A row for each patient, a column for each study; 256 colours."""
    # the texts set the height of a row: begin with a sheet that is high enough, and cut it at the end
    sheet = Image.new("RGB", (GAP + STUDIES * (SIDE + GAP), 3 * PATIENTS * SIDE), PAPER)
    pen, top = ImageDraw.Draw(sheet), GAP
    for states in choose(seed):
        pen.text((GAP, top), f"Patient {states[0].subject_id}, a {states[0].anatomy.sex}", INK, TEXT)
        bottoms = []
        for column, state in enumerate(states):
            x = GAP + column * (SIDE + GAP)
            day = (state.date - states[0].date).days
            pen.text((x, top + 34), f"{state.view}, day {day}", FAINT, SMALL)
            image = Image.fromarray(picture(state, state.view, SIDE, aligned))
            sheet.paste(few_greys(image), (x, top + 57))
            findings = report(state).split(" FINDINGS:")[1].split(" IMPRESSION:")[0]
            bottoms.append(write(pen, (x, top + 65 + SIDE), findings, SIDE))
        top = max(bottoms) + 27
    return sheet.crop((0, 0, sheet.width, top)).quantize()
