"""Draws the pictures of the trained phantom, from what `make phantom` leaves in a folder.

    python assets/draw.py runs
"""

import json
import sys
from pathlib import Path

from PIL import Image, ImageDraw

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from assets.contact_sheet import FAINT, LINE, PAPER, SMALL, few_greys, write  # noqa: E402
from phantom.history import history, picture  # noqa: E402
from plumbing.log import curves  # noqa: E402

SIDE, GAP, WIDTH = 300, 24, 620  # pixels: an image, the space around it, the lines of a report
DEMO_PATIENT, DEMO_STUDY = 9939, 2  # of the hospital with seed 0; held out
STAGES = {"0: findings, one image": "pretrain", "1: what has changed": "difference", "2: findings and change": "lora"}


def read_lines(path: Path, key: str) -> dict[str, dict]:
    """The lines of a .jsonl file, by the value of a key."""
    lines = map(json.loads, path.read_text().splitlines())
    return {line[key]: line for line in lines}


def draw_demo():
    """current.png and prior.png: one study that no training has seen, and the study before it."""
    state = history(0, DEMO_PATIENT)[DEMO_STUDY]
    for name, study in (("current", state), ("prior", state.prior)):
        image = Image.fromarray(picture(study, study.view, 320))
        image.save(HERE / f"{name}.png", optimize=True)


def draw_reports(runs: Path):
    """reports.png: the first three studies of `eval.py prior` in which a severity has changed, right or not."""
    # 1) what was asked, what is true, and what the model wrote
    questions = read_lines(runs / "hospital/data/findings_test_questions.jsonl", "question_id")
    truths = read_lines(runs / "hospital/truth.jsonl", "dicom_id")  # which is also the question's id
    answers = read_lines(runs / "phantom_priors/true.jsonl", "question_id")
    swapped = read_lines(runs / "phantom_priors/reversed.jsonl", "question_id")
    changed = [name for name in answers if {"worse", "improved"} & set(truths[name]["changes"].values())]

    # 2) a row: prior and current image, then the model's report, the true one, and the swapped one
    height = SIDE + GAP + LINE
    sheet = Image.new("RGB", (4 * GAP + 2 * SIDE + WIDTH, 3 * height + GAP), PAPER)
    pen = ImageDraw.Draw(sheet)
    for row, name in enumerate(changed[:3]):
        y = GAP + row * height
        for column, title in enumerate(("current", "prior")):
            x = GAP + (1 - column) * (SIDE + GAP)
            image = Image.open(runs / "hospital" / questions[name]["image"][column])
            pen.text((x, y), title, FAINT, SMALL)
            image = few_greys(image.resize((SIDE, SIDE), Image.BICUBIC))
            sheet.paste(image, (x, y + LINE))
        # the reports are one below the other, on the right
        texts = {
            "the model's report": answers[name]["text"],
            "the hospital's report": questions[name]["reference"],
            "the model's, with the two images exchanged": swapped[name]["text"],
        }
        for title, text in texts.items():
            x = 3 * GAP + 2 * SIDE
            pen.text((x, y), title, FAINT, SMALL)
            y = write(pen, (x, y + LINE), text, WIDTH) + LINE // 2
    sheet.quantize().save(HERE / "reports.png", optimize=True)


def draw_losses(runs: Path):
    """phantom_loss.svg: the validation loss of the stages that were run."""
    points = {}
    for stage, name in STAGES.items():
        log = runs / f"phantom_{name}/log.jsonl"
        if not log.exists():
            continue
        # a line has the losses either of training or of validation
        lines = [json.loads(line) for line in log.read_text().splitlines() if '"validation loss"' in line]
        points[stage] = [(line["step"], line["validation loss"]) for line in lines]
    (HERE / "phantom_loss.svg").write_text(curves("validation loss", "step of its stage", points))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    draw_demo()
    draw_reports(Path(sys.argv[1]))
    draw_losses(Path(sys.argv[1]))
