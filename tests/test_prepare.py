import csv
import gzip
import hashlib
import io
import json
import random
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, read, seconds_of_children
from PIL import Image
from test_mimic import REPORT, brute_priors, random_images

import prepare
from prepare import prompt

COLUMNS = "dicom_id,subject_id,study_id,PerformedProcedureStepDescription,ViewPosition,Rows,Columns,StudyDate,StudyTime"


def run(*arguments):
    return prepare.main(prepare.parse(list(map(str, arguments))))


def lines(path):
    return [json.loads(text) for text in Path(path).read_text().splitlines()]


def refused(capsys, *arguments, words=()):
    """The command ends with status 2 and one line on stderr that holds the words."""
    assert run(*arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("prepare.py: ") and all(word in error for word in words), error


class Hospital:
    """A folder laid out as MIMIC-CXR is, whose images are a few bytes."""

    def __init__(self, root):
        self.root, self.metadata, self.split = root, [], []
        (root / "files").mkdir(parents=True)

    def study(self, subject, study, report, encoding="utf-8"):
        folder = self.root / "files" / f"p{subject}"[:3] / f"p{subject}"
        (folder / f"s{study}").mkdir(parents=True, exist_ok=True)
        if report is not None:
            (folder / f"s{study}.txt").write_bytes(report.encode(encoding))

    def image(self, subject, study, dicom, date, time="", view="PA", split="train", suffix=".jpg", data=b"x"):
        if suffix:
            folder = self.root / "files" / f"p{subject}"[:3] / f"p{subject}" / f"s{study}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / (dicom + suffix)).write_bytes(data)
        self.metadata.append([dicom, subject, study, "CHEST", view, 9, 9, date, time])
        if split:
            self.split.append([dicom, study, subject, split])

    def close(self):
        for name, header, rows in (
            ("metadata", COLUMNS.split(","), self.metadata),
            ("split", ["dicom_id", "study_id", "subject_id", "split"], self.split),
        ):
            with gzip.open(self.root / f"mimic-cxr-2.0.0-{name}.csv.gz", "wt", newline="") as file:
                csv.writer(file).writerows([header, *rows])
        return self.root


# ------------------------------------------------------------------------------------------------ prompts


def test_the_prompt_is_the_published_one():
    query = read("libra-7b", "case0", "expected.json")["query"]
    context = {"history": "cough, fever.", "indication": "65 year old\n woman   with dyspnea.", "findings": "Clear."}
    assert prompt("findings", context) == query
    turn = read("training", "records.json")[2]["conversations"][0]["value"]
    assert "<image>\n" + prompt("findings", {"history": "Chest tightness.", "indication": " \n"}) == turn
    assert prompt("impression", {}) == "Provide a detailed description of the impression in the radiology image."


# ------------------------------------------------------------------------------------------- every image


def random_hospital(root, patients, seed=2):
    draw, hospital, truth = random.Random(seed), Hospital(root), {}
    for patient in range(patients):
        subject, split = 10000000 + 37 * patient, draw.choices(["train", "validate", "test"], [3, 1, 1])[0]
        images = random_images(draw, ["21800101", "21800102", "21800301", ""], [None, 5.5, 80000.0, 235959.999])
        images = [
            image._replace(dicom=hashlib.md5(f"{patient} {image.dicom}".encode()).hexdigest()) for image in images
        ]
        days = {date: 50000000 + 100 * patient + place for place, date in enumerate(sorted({i.date for i in images}))}
        for date, study in days.items():
            hospital.study(subject, study, REPORT.format(f"Seen on {date or 'a day'}.", "As above."))
        for image in draw.sample(images, len(images)):  # metadata is in no order
            hospital.image(subject, days[image.date], image.dicom, image.date, image.time or "", split=split)
            truth[image.dicom] = brute_priors(images)[image], split, image.date
    return hospital.close(), truth


def test_every_image_becomes_a_record_with_its_prior(tmp_path, capsys):
    root, truth = random_hospital(tmp_path / "hospital", 60)
    assert run("mimic-cxr", "--root", root, "--out", tmp_path / "out") == 0
    records = {}
    for split in ("train", "validate"):
        found = {record["id"]: record for record in lines(tmp_path / "out" / f"findings_{split}.jsonl")}
        assert {dicom for dicom, (_, name, _) in truth.items() if name == split} == set(found)
        records |= {dicom: (r["image"], r["conversations"][1]["value"]) for dicom, r in found.items()}
    for split in ("validate", "test"):
        for question in lines(tmp_path / "out" / f"findings_{split}_questions.jsonl"):
            answer = question["image"], question["reference"]
            assert records.setdefault(question["question_id"], answer) == answer
    assert set(records) == set(truth)
    for dicom, (images, answer) in records.items():
        prior, _, date = truth[dicom]
        assert [Path(image).stem for image in images] == [dicom, *([prior.dicom] if prior else [])]
        assert all((root / image).is_file() for image in images)
        assert answer == f"Seen on {date or 'a day'}."
    row = next(text for text in capsys.readouterr().out.splitlines() if text.startswith("findings_train.jsonl"))
    train = [prior for prior, name, _ in truth.values() if name == "train"]
    assert row.split()[3:5] == [str(len(train)), str(sum(prior is not None for prior in train))]


# ---------------------------------------------------------------------------------------------- mimic-cxr


@pytest.fixture
def odd(tmp_path):
    """A hospital in which everything that can be wrong is."""
    hospital = Hospital(tmp_path / "odd")
    one, two, three = 10000001, 11000002, 12000003
    hospital.study(one, 1, REPORT.format("First.\n FINDINGS:  Café\n is closed.", "None."), "latin-1")
    hospital.study(one, 2, REPORT.format("Later.", "Better.").replace("\n", "\r\n"))
    hospital.study(one, 3, "")
    hospital.study(one, 4, "Just text.\n")
    hospital.study(one, 5, REPORT.format("___", "Lone."))
    hospital.study(two, 6, None)
    hospital.study(two, 58235663, REPORT.format("Kept out.", "Kept out."))
    hospital.study(two, 57936451, REPORT.format("Kept out.", "Kept out."))
    hospital.study(three, 7, REPORT.format("Tested.", "Fine."))
    hospital.image(one, 1, "a", "21800101", 90000)
    hospital.image(one, 1, "b", "21800101", 80000, suffix=".dcm")
    hospital.image(one, 1, "lateral", "21800101", 235959, view="LATERAL")
    hospital.image(one, 1, "unseen", "21800101", 235959, suffix="")
    hospital.image(one, 1, "void", "21800101", 235959, data=b"")
    hospital.image(one, 2, "c", "21800102", "")
    for place in (3, 4, 5):
        hospital.image(one, place, f"d{place}", "21800105")
    for place, study in enumerate((6, 58235663, 57936451)):
        hospital.image(two, study, f"e{place}", f"2180010{place}", split="validate")
    hospital.image(three, 7, "f", "21800101", split="test")
    hospital.image(three, 7, "g", "", split="test")
    hospital.image(three, 7, "nosplit", "21800101", split="")
    hospital.image(three, 7, "elsewhere", "21800101", split="holdout")
    hospital.image(three, 7, "f", "21700101", view="LATERAL", split="")  # twice: the first row rules
    hospital.metadata += [
        ["x", "", 7, "", "PA", 9, 9, "21800101", ""],
        ["../x", 1, 7, "", "PA", 9, 9, "", ""],
        ["short"],
    ]
    hospital.split.append(["nometadata", 99, one, "train"])
    return hospital.close()


def test_what_is_odd_is_left_out_and_counted(odd, tmp_path, capsys):
    assert run("mimic-cxr", "--root", odd, "--out", tmp_path) == 0
    out = capsys.readouterr().out
    folder = "files/p10/p10000001"
    context = " Following clinical context: Indication: ___F with dyspnea"
    question = prepare.PROMPTS["findings"] + context
    turns = lambda answer: [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    assert lines(tmp_path / "findings_train.jsonl") == [
        {"id": "b", "image": [f"{folder}/s1/b.dcm"], "conversations": turns("Café is closed.")},
        {"id": "a", "image": [f"{folder}/s1/a.jpg"], "conversations": turns("Café is closed.")},
        {"id": "c", "image": [f"{folder}/s2/c.jpg", f"{folder}/s1/a.jpg"], "conversations": turns("Later.")},
    ]
    impressions = lines(tmp_path / "impression_train.jsonl")
    assert [(r["id"], r["conversations"][1]["value"]) for r in impressions][2:] == [("c", "Better."), ("d5", "Lone.")]
    assert impressions[3]["image"] == [f"{folder}/s5/d5.jpg", f"{folder}/s2/c.jpg"]
    (misplaced,) = lines(tmp_path / "findings_validate_questions.jsonl")
    assert misplaced == {
        "question_id": "e2",
        "image": ["files/p11/p11000002/s57936451/e2.jpg", "files/p11/p11000002/s58235663/e1.jpg"],
        "text": prepare.PROMPTS["findings"],
        "reference": "___F with dyspnea",
    }
    tested = lines(tmp_path / "findings_test_questions.jsonl")
    assert [(q["question_id"], len(q["image"])) for q in tested] == [("g", 1), ("f", 1)]
    assert not (tmp_path / "impression_validate.jsonl").exists()  # no record, no file
    counted = dict(
        re.findall(r"^ *(\d+)  (.*)$", out, re.M)
        and [(b, int(a)) for a, b in re.findall(r"^ *(\d+)  (.*)$", out, re.M)]
    )
    assert counted == {
        "metadata rows without a readable dicom, subject or study id": 2,
        "metadata rows with the dicom id of an earlier row": 1,
        "rows of mimic-cxr-2.0.0-metadata.csv.gz with too few or too many fields": 1,
        "images that are not frontal (view AP or PA)": 1,
        "frontal images without a split": 1,
        "images of a split of another name": 1,
        "studies of the split file without metadata": 1,
        "patients in more than one split; their priors come from the same split": 1,
        "frontal images missing or empty on disk": 2,
        "images without a readable date: no prior": 1,
        "reports in Latin-1": 1,
        "studies with an empty report": 1,
        "studies without a report": 1,
        "studies with an exception of the official preparation: no findings by span": 1,
        "studies with an exception of the official preparation: misplaced findings": 1,
        "images of a study without findings": 5,
        "images of a study without impression": 5,
    }


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends_are_translated_before_characters_are_counted(tmp_path, end):
    hospital, report = Hospital(tmp_path / "ends"), REPORT.format("Words.\n " * 40, "None.")
    hospital.study(17069955, 51410602, report.replace("\n", end))
    hospital.image(17069955, 51410602, "a", "21800101", split="test")
    assert run("mimic-cxr", "--root", hospital.close(), "--out", tmp_path) == 0
    (question,) = lines(tmp_path / "findings_test_questions.jsonl")
    assert question["reference"] == " ".join(report[47:320].split())


def test_one_section_alone_and_reports_elsewhere(odd, tmp_path):
    elsewhere = tmp_path / "reports" / "files" / "p12" / "p12000003"
    elsewhere.mkdir(parents=True)
    (elsewhere / "s7.txt").write_text(REPORT.format("From elsewhere.", ""))
    flags = "--root", odd, "--out", tmp_path / "out", "--reports", tmp_path / "reports", "--section", "findings"
    assert run("mimic-cxr", *flags) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["findings_test_questions.jsonl"]
    assert {q["reference"] for q in lines(tmp_path / "out" / "findings_test_questions.jsonl")} == {"From elsewhere."}


def test_a_second_run_makes_only_what_is_missing(odd, tmp_path, capsys):
    assert run("mimic-cxr", "--root", odd, "--out", tmp_path) == 0
    made = {path: (path.read_bytes(), path.stat().st_ino) for path in tmp_path.glob("*.jsonl")}
    gone = tmp_path / "findings_test_questions.jsonl"
    gone.unlink()
    capsys.readouterr()
    assert run("mimic-cxr", "--root", odd, "--out", tmp_path) == 0
    printed = capsys.readouterr()
    assert "kept, as they are there: findings_train.jsonl" in printed.err and gone.name not in printed.err
    assert all(path.read_bytes() == data for path, (data, _) in made.items())
    assert {path for path, (_, inode) in made.items() if path.stat().st_ino == inode} >= set(made) - {gone}
    assert gone.name in printed.out and "findings_train.jsonl" in printed.out


def test_bad_input_is_one_line_and_leaves_nothing(odd, tmp_path, capsys):
    out = tmp_path / "out"
    command = "mimic-cxr", "--root", odd, "--out", out
    metadata, split = (odd / f"mimic-cxr-2.0.0-{name}.csv.gz" for name in ("metadata", "split"))
    data = metadata.read_bytes()
    for cut in (20, len(data) // 2, len(data) - 5):
        metadata.write_bytes(data[:cut])
        refused(capsys, *command, words=[str(metadata), "fetch it again"])
    metadata.write_bytes(b"dicom_id,subject_id")
    refused(capsys, *command, words=[str(metadata), "fetch it again"])
    metadata.write_bytes(gzip.compress(b"dicom_id,subject_id,study_id\n"))
    refused(
        capsys,
        *command,
        words=["no column ViewPosition, StudyDate, StudyTime", "it has dicom_id, subject_id, study_id"],
    )
    metadata.write_bytes(gzip.compress(b""))
    refused(capsys, *command, words=["it has none"])
    metadata.write_bytes(data)
    split.unlink()
    refused(capsys, *command, words=["mimic-cxr-*-split.csv*", "found none"])
    split.write_bytes(gzip.compress(b"dicom_id,study_id,split\nz,1,train\n"))
    refused(capsys, *command, words=["no record came of it", "without a split"])
    refused(capsys, *command[:2], odd / "files", *command[3:], words=["no folder", str(odd / "files" / "files")])
    assert not out.exists() or not list(out.iterdir())


def start(*arguments, **settings):
    command = [sys.executable, str(ROOT / "prepare.py"), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **settings)


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    root, _ = random_hospital(tmp_path / "hospital", 300)
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    process = start("mimic-cxr", "--root", root, "--out", tmp_path / "out", preexec_fn=limit)
    _, error = process.communicate()
    assert process.returncode == 2 and error.count("\n") == 1, error
    assert "too large" in error and str(tmp_path / "out") in error
    assert not list((tmp_path / "out").iterdir())


def test_a_killed_run_is_finished_by_the_next_with_the_same_bytes(tmp_path):
    root, _ = random_hospital(tmp_path / "hospital", 400)
    assert run("mimic-cxr", "--root", root, "--out", tmp_path / "whole") == 0
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert len(whole) == 8
    draw, out, killed = random.Random(3), tmp_path / "out", 0
    out.mkdir()
    for _ in range(6):
        before = set(out.iterdir())
        process = start("mimic-cxr", "--root", root, "--out", out)
        while process.poll() is None and not set(out.iterdir()) - before:
            time.sleep(0.001)
        time.sleep(draw.random() * 0.03)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
        assert all(path.read_bytes() == whole[path.name] for path in out.glob("[!.]*"))
        if len(list(out.glob("[!.]*"))) == len(whole):  # finished: give the next one work
            for path in draw.sample(sorted(out.iterdir()), 5):
                path.unlink()
    assert killed > 1
    assert run("mimic-cxr", "--root", root, "--out", out) == 0
    assert {path.name: path.read_bytes() for path in out.glob("[!.]*")} == whole
    assert not list(out.glob(".*"))


# --------------------------------------------------------------------------------------------------- VQA

QUESTIONS = [
    ("2", "10000001", "1", "difference", "what has changed?", "the café, closed", "train"),
    ("2", "10000001", "1.0", "location", "where?", "left", "train"),
    ("1", "10000001", "2", "level", "how bad?", "mild", "val"),
    ("7", "12000003", "7", "view", "which view?", "pa view", "test"),
    ("7", "12000003", "6", "view", "which view?", "", "test"),
    ("8", "12000003", "6", "view", "which view?", "pa", "test"),
    ("7", "12000003", "999", "view", "which view?", "pa", "test"),
    ("7", "12000003", "7", "view", "which view?", "pa", "dev"),
    ("10", "12000003", "7", "view", "which view?", "pa", "test"),
]


def test_difference_questions_show_the_main_study_beside_its_reference(odd, tmp_path, capsys):
    metadata = gzip.decompress((odd / "mimic-cxr-2.0.0-metadata.csv.gz").read_bytes())
    more = b"side,12000003,8,CHEST,LATERAL,9,9,21800101,\nlost,12000003,10,CHEST,PA,9,9,21800101,\n"
    (odd / "mimic-cxr-2.0.0-metadata.csv.gz").write_bytes(gzip.compress(metadata + more))
    file = tmp_path / "mimic_pair_questions.csv"
    with open(file, "w", newline="", encoding="latin-1") as opened:
        csv.writer(opened).writerows([prepare.DIFF_VQA, *QUESTIONS])
    assert run("diff-vqa", "--root", odd, "--questions", file, "--out", tmp_path / "out") == 0
    first, second = lines(tmp_path / "out" / "diff_vqa_train.jsonl")
    pair = ["files/p10/p10000001/s2/c.jpg", "files/p10/p10000001/s1/a.jpg"]  # the last frontal image of each
    assert first == {
        "id": "diff_vqa_0",
        "image": pair,
        "conversations": [
            {"from": "human", "value": "<image>\nwhat has changed?"},
            {"from": "gpt", "value": "the café, closed"},
        ],
    }
    assert second["image"] == pair and second["id"] == "diff_vqa_1"
    (question,) = lines(tmp_path / "out" / "diff_vqa_validate_questions.jsonl")
    assert question == {"question_id": "diff_vqa_2", "image": pair[::-1], "text": "how bad?", "reference": "mild"}
    assert len(lines(tmp_path / "out" / "diff_vqa_test_questions.jsonl")) == 1
    out = capsys.readouterr().out
    for reason in (
        "1  questions without a question or an answer",
        "1  questions whose study has no frontal image\n",
        "1  questions whose reference study has no metadata",
        "1  questions of a split of another name",
        "1  questions whose study has no frontal image on disk",
        "1  lines of mimic_pair_questions.csv in Latin-1",
        "question_type: difference 1, level 1, location 1, view 1",
    ):
        assert reason in out
    row = next(text for text in out.splitlines() if text.startswith("diff_vqa_train.jsonl")).split()
    assert row == ["diff_vqa_train.jsonl", "1", "1", "2", "2", "(100%)", "2.0", "2.0"]
    common = "diff-vqa", "--root", odd, "--questions", file, "--out", tmp_path / "out"
    assert run(*common, "--type", "difference") == 0
    assert lines(tmp_path / "out" / "difference_train.jsonl") == [first]
    capsys.readouterr()
    assert run(*common, "--type", "differences") == 2
    assert "no question of type 'differences'" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("differences*"))


def vqa(path, question, answer, **more):
    subject, study, image = path.split("/")[-3:]
    row = {"subject_id": subject[1:], "study_id": study[1:], "image_id": image[:-4], "image_path": path}
    return row | {"question": question, "semantic_type": "choose", "content_type": "anatomy", "answer": answer} | more


def test_questions_about_one_image_have_no_prior(odd, tmp_path, capsys):
    there, lost = "p10/p10000001/s2/c.jpg", "p10/p10000001/s1/unseen.jpg"
    (tmp_path / "train.json").write_text(json.dumps([vqa(there, "what?", ["left", "right"]), vqa(there, "is it?", [])]))
    rows = [vqa(lost, "what?", ["no"]), vqa(f"files/{there}", "so?", ["yes"]), vqa("../../../x.jpg", "so?", ["yes"])]
    (tmp_path / "valid.json").write_text(json.dumps(rows, indent=1))
    command = "cxr-vqa", "--root", odd, "--questions", tmp_path, "--out", tmp_path / "out"
    assert run(*command) == 0
    (record,) = lines(tmp_path / "out" / "cxr_vqa_train.jsonl")
    assert record["image"] == [f"files/{there}"] and record["conversations"][1]["value"] == "left, right"
    (question,) = lines(tmp_path / "out" / "cxr_vqa_validate_questions.jsonl")
    images = [f"files/{there}"]
    assert question == {"question_id": "cxr_vqa_validate_1", "image": images, "text": "so?", "reference": "yes"}
    out = capsys.readouterr().out
    assert "2  questions whose image is missing on disk" in out and "1  questions with an empty answer" in out
    assert "1  file *test.json, which is not there" in out and "semantic_type: choose 2" in out
    (tmp_path / "train.json").write_text("not read again")
    (tmp_path / "test.json").write_text('[\n{"question": "what?"}\n]')
    refused(capsys, *command, words=["test.json record 1 has no column subject_id", "it has question"])
    assert not (tmp_path / "out" / "cxr_vqa_test_questions.jsonl").exists()


# --------------------------------------------------------------------------------------------------- rrg


def picture(level, kind="PNG"):
    file = io.BytesIO()
    Image.new("L", (4, 4), level).save(file, kind)
    return {"bytes": file.getvalue(), "path": None}


def test_the_published_set_is_read_from_parquet_files(tmp_path, capsys):
    pytest.importorskip("datasets")
    import pyarrow
    from pyarrow import parquet

    rows = {
        "main_image": [picture(1), picture(2, "JPEG"), {"bytes": b"no image", "path": None}, picture(1)],
        "prior_image": [picture(3), None, picture(1), picture(1)],
        "default_prompt": ["What?", "And?", "Why?", "So?"],
        "findings": ["A heart.\nTwo lungs.", "None.", "Lost.", "Again."],
    }
    folder = tmp_path / "set" / "findings_section"
    folder.mkdir(parents=True)
    table = pyarrow.table(rows)
    parquet.write_table(table.slice(0, 2), folder / "test-00000-of-00002.parquet")
    parquet.write_table(table.slice(2), folder / "test-00001-of-00002.parquet")
    command = "rrg", "--source", tmp_path / "set", "--out", tmp_path / "out", "--reference"
    assert run(*command, "findings") == 0
    assert "1  rows whose image is missing or cannot be read" in capsys.readouterr().out
    questions = lines(tmp_path / "out" / "findings_section_test_questions.jsonl")
    assert [question["question_id"][-1] for question in questions] == ["0", "1", "3"]
    assert [question["reference"] for question in questions] == ["A heart. Two lungs.", "None.", "Again."]
    data = [[(tmp_path / "out" / image).read_bytes() for image in question["image"]] for question in questions]
    assert data == [[picture(1)["bytes"], picture(3)["bytes"]], [picture(2, "JPEG")["bytes"]], [picture(1)["bytes"]]]
    assert questions[0]["image"][0] == questions[2]["image"][0]  # an image is stored once
    assert sorted(path.suffix for path in (tmp_path / "out" / "images").iterdir()) == [".jpg", ".png", ".png"]
    (tmp_path / "out" / "findings_section_test_questions.jsonl").unlink()
    refused(capsys, *command, "impressions", words=["no column impressions", "it has main_image, prior_image"])
    refused(capsys, *command, "findings", "--split", "dev", words=["no dev*.parquet in"])


# ------------------------------------------------------------------------------------------------- check


def test_records_and_questions_are_checked_beside_their_images(tmp_path, capsys):
    images = tmp_path / "images"
    images.mkdir()
    for number in range(4):
        (images / f"{number}.png").touch()
    records = read("training", "records.json")
    questions = [{"question_id": number, "image": "0.png", "text": "What?"} for number in range(5)]
    (tmp_path / "list.json").write_text(json.dumps(records + records))
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    for name, words in (("list.json", "6 records; 3 have the id"), ("lines.jsonl", "5 records; 0 have the id")):
        assert run("check", tmp_path / name, "--image-folder", images) == 0
        assert f"no fault in {words}" in capsys.readouterr().out
    (images / "0.png").unlink()
    assert run("check", tmp_path / "list.json") == 0
    refused(capsys, "check", tmp_path / "list.json", "--image-folder", images, words=["record 1: no image 0.png"])


def test_check_tells_all_that_is_wrong_in_one_line(tmp_path, capsys):
    file, question = tmp_path / "mine.jsonl", {"question_id": 7, "image": "../0.png", "text": "What?"}
    file.write_text("".join(json.dumps(line) + "\n" for line in [question, question, ["a"], question | {"text": 3}]))
    words = "4 in all", "line 1: image ../0.png leads out", "line 2: its id", "line 3: is not a", "line 4: text is"
    refused(capsys, "check", file, "--image-folder", tmp_path, words=words)
    for data, words in {
        b"": ["is empty"],
        b"[]": ["holds no record"],
        b'{"id": 1}\n{"id": \n': ["line 2: is not JSON"],
        b'{"id": "\xe9"}': ["line 1 is not JSON", "0xe9"],
    }.items():
        file.write_bytes(data)
        refused(capsys, "check", file, words=[str(file), *words])
    refused(capsys, "check", tmp_path / "none.json", words=["none.json"])
    refused(capsys, "check", file, "--image-folder", tmp_path / "none", words=["no image folder"])


# ------------------------------------------------------------------------------------- the whole hospital


def test_help_answers_at_once_and_a_wrong_command_is_one_line():
    begin = seconds_of_children()
    process = start("--help")
    out, _ = process.communicate()
    assert process.returncode == 0 and "mimic-cxr" in out and seconds_of_children() - begin < 1
    process = start("mimic-cxr", "--root", "a", "--out", "b", "--reprots", "c")
    _, error = process.communicate()
    assert process.returncode == 2 and error.count("\n") == 1 and "did you mean --reports?" in error


def test_the_drawn_hospital_is_prepared_whole(tmp_path, capsys):
    root, out = tmp_path / "hospital", tmp_path / "data"
    assert run("phantom", "--out", root, "--patients", 12, "--size", 64, "--workers", 1) == 0
    assert run("mimic-cxr", "--root", root, "--out", out) == 0
    assert run("mimic-cxr", "--root", root, "--out", out, "--section", "findings", "--no-context") == 0
    with_context, without = (lines(out / f"findings{name}_train.jsonl") for name in ("", "_no_context"))
    for one, other in zip(with_context, without, strict=True):
        (asked, said), (plain, same) = one.pop("conversations"), other.pop("conversations")
        assert asked["value"].startswith(f"{plain['value']} Following clinical context: ")
        assert (one, said) == (other, same)
    assert run("diff-vqa", "--root", root, "--questions", root / "mimic_pair_questions.csv", "--out", out) == 0
    assert run("cxr-vqa", "--root", root, "--questions", root, "--out", out) == 0
    capsys.readouterr()
    made = sorted(out.iterdir())
    assert {"findings_train.jsonl", "impression_train.jsonl", "diff_vqa_train.jsonl", "cxr_vqa_train.jsonl"} <= {
        path.name for path in made
    }
    for path in made:
        assert run("check", path, "--image-folder", root) == 0
        assert "no fault in" in capsys.readouterr().out
    assert {len(record["image"]) for record in lines(out / "findings_train.jsonl")} == {1, 2}
