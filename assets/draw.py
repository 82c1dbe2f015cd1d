"""The pictures of the README that show the phantom model.

    python assets/draw.py demo PATIENT STUDY                        assets/current.png, assets/prior.png
    python assets/draw.py reports runs/phantom_priors runs/hospital assets/reports.png
    python assets/draw.py curves runs                               assets/phantom_loss.svg

`reports` takes the first studies of an answer file (eval.py prior) in which a severity has changed, good or bad.
"""

import json
import sys
from pathlib import Path

from PIL import Image, ImageDraw

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))


from phantom.hospital import FAINT, PAPER, few_colours, history, paragraph, picture, write_lines  # noqa: E402
from phantom.radiograph import font  # noqa: E402
from plumbing.log import curves  # noqa: E402

SIZE, GAP, WIDTH = 280, 24, 620  # of an image, around everything, of the texts: pixels


def demo(patient: int, number: int, size: int = 320):
    """One study of the README's hospital, which no training has seen, and the study before it."""
    states = history(0, patient)
    assert states[number].split == "test" and number > 0
    for name, state in (("current", states[number]), ("prior", states[number - 1])):
        Image.fromarray(picture(state, state.view, size)).save(HERE / f"{name}.png", optimize=True)


def reports(priors: Path, hospital: Path, count: int = 3):
    answers = {name: _lines(priors / f"{name}.jsonl") for name in ("true", "reversed")}
    turned = {line["question_id"]: line["text"] for line in answers["reversed"]}
    questions = {line["question_id"]: line for line in _lines(hospital / "data" / "findings_test_questions.jsonl")}
    truths = {line["dicom_id"]: line["changes"] for line in _lines(hospital / "truth.jsonl")}
    changed = lambda line: {"worse", "improved"} & set(truths[line["question_id"]].values())
    chosen = [line for line in answers["true"] if changed(line)][:count]

    text, small, line = font(15), font(13), 20
    sheet = Image.new("RGB", (4 * GAP + 2 * SIZE + WIDTH, count * (SIZE + GAP + line) + GAP), PAPER)
    draw, top = ImageDraw.Draw(sheet), GAP
    for answer in chosen:
        question, x, y = questions[answer["question_id"]], GAP, top + line
        for name, image in zip(("prior", "current"), reversed(question["image"]), strict=True):
            draw.text((x, top), name, FAINT, small)
            sheet.paste(Image.open(hospital / image).convert("RGB").resize((SIZE, SIZE), Image.BICUBIC), (x, y))
            x += SIZE + GAP
        for name, words in (
            ("the model's report", answer["text"]),
            ("the hospital's report", question["reference"]),
            ("the model's, with the two images exchanged", turned[answer["question_id"]]),
        ):
            draw.text((x, y - line), name, FAINT, small)
            y = write_lines(draw, x, y, paragraph(words, text, WIDTH), text, line)
            y += 1.5 * line
        top += SIZE + GAP + line
    few_colours(sheet).save(HERE / "reports.png", optimize=True)


def losses(runs: Path):
    stages = {"0: everything": "phantom_pretrain", "1: TAC alone": "phantom_align", "2: LoRA and TAC": "phantom_lora"}
    logs = {name: _lines(runs / folder / "log.jsonl") for name, folder in stages.items()}
    points = {
        name: [(line["step"], line["validation loss"]) for line in log if "validation loss" in line]
        for name, log in logs.items()
    }
    (HERE / "phantom_loss.svg").write_text(curves("validation loss", "step of its stage", points))


def _lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


if __name__ == "__main__":
    if sys.argv[1:2] == ["demo"] and len(sys.argv) == 4:
        demo(int(sys.argv[2]), int(sys.argv[3]))
    elif sys.argv[1:2] == ["reports"] and len(sys.argv) == 4:
        reports(Path(sys.argv[2]), Path(sys.argv[3]))
    elif sys.argv[1:2] == ["curves"] and len(sys.argv) == 3:
        losses(Path(sys.argv[2]))
    else:
        sys.exit(__doc__)
