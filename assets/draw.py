"""Draws the README's pictures of the phantom model.

python assets/draw.py demo PATIENT STUDY                          writes assets/current.png and assets/prior.png
python assets/draw.py reports runs/phantom_priors runs/hospital   writes assets/reports.png
python assets/draw.py curves runs                                 writes assets/phantom_loss.svg
"""

import json
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from assets.contact_sheet import FAINT, PAPER, few_colours, paragraph, write_lines  # noqa: E402
from phantom.history import history, picture  # noqa: E402
from plumbing.log import curves  # noqa: E402


def demo(patient: str, number: str):
    """One study of the README's hospital, which no training has seen, and the study before it."""
    state = history(0, int(patient))[int(number)]
    assert state.split == "test"
    for name, study in (("current", state), ("prior", state.prior)):
        Image.fromarray(picture(study, study.view, 320)).save(HERE / f"{name}.png", optimize=True)


def reports(priors: str, hospital: str):
    """The first three studies of `eval.py prior` in which a severity has changed, whether the model is right or not."""
    swapped = {line["question_id"]: line["text"] for line in _lines(priors, "reversed.jsonl")}
    questions = {line["question_id"]: line for line in _lines(hospital, "data/findings_test_questions.jsonl")}
    changes = {line["dicom_id"]: set(line["changes"].values()) for line in _lines(hospital, "truth.jsonl")}
    answers = [line for line in _lines(priors, "true.jsonl") if changes[line["question_id"]] & {"worse", "improved"}]

    # a row: prior and current image, `side` pixels wide, then the model's report, the true one, and the swapped one
    side, gap, width, line = 280, 24, 620, 20
    height, font, small = side + gap + line, ImageFont.load_default(15), ImageFont.load_default(13)
    sheet = Image.new("RGB", (4 * gap + 2 * side + width, 3 * height + gap), PAPER)
    pen = ImageDraw.Draw(sheet)
    for row, answer in enumerate(answers[:3]):
        question = questions[answer["question_id"]]
        x, y = gap, gap + row * height + line
        for name, path in zip(("prior", "current"), reversed(question["image"]), strict=True):
            image = Image.open(Path(hospital, path)).convert("RGB")
            pen.text((x, y - line), name, FAINT, small)
            sheet.paste(image.resize((side, side), Image.BICUBIC), (x, y))
            x += side + gap
        texts = {"the model's report": answer["text"], "the hospital's report": question["reference"]}
        texts["the model's, with the two images exchanged"] = swapped[answer["question_id"]]
        for name, text in texts.items():
            pen.text((x, y - line), name, FAINT, small)
            y = write_lines(pen, (x, y), paragraph(text, font, width), font, line) + 1.5 * line
    few_colours(sheet).save(HERE / "reports.png", optimize=True)


def losses(runs: str):
    points, stages = {}, {"0: everything": "phantom_pretrain", "1: TAC alone": "phantom_align"}
    stages["2: LoRA and TAC"] = "phantom_lora"
    for name, folder in stages.items():
        log = _lines(runs, folder, "log.jsonl")
        points[name] = [(line["step"], line["validation loss"]) for line in log if "validation loss" in line]
    (HERE / "phantom_loss.svg").write_text(curves("validation loss", "step of its stage", points))


def _lines(*path: str) -> list[dict]:
    return [json.loads(line) for line in Path(*path).read_text().splitlines()]


if __name__ == "__main__":
    commands = {"demo": demo, "reports": reports, "curves": losses}
    if not sys.argv[1:] or sys.argv[1] not in commands:
        sys.exit(__doc__)
    commands[sys.argv[1]](*sys.argv[2:])
