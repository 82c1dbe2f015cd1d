"""Sections against the published parser's values, priors against a double loop; then MIMIC-CXR as a whole."""

import hashlib
import math
import os
import random
import re
from collections import Counter

import pytest
from conftest import REPORT, Hospital, read, read_lines, run_prepare

from sources import mimic
from sources.mimic import Image, priors, prompt, section_name, split_report, study_sections


def sections(text, study="0"):
    return study_sections(study, text)


@pytest.mark.parametrize("number", range(58))
def test_reports_are_cut_as_the_published_parser_cuts_them(number):
    case = read("text", "sections.json")[number]
    parts = split_report(case["report"])
    assert [part.name for part in parts] == case["names"]
    assert [part.text for part in parts] == case["sections"]
    texts = sections(case["report"])
    assert {name: texts.get(name) for name in case["columns"]} == case["columns"]


def test_headers_are_named_by_the_published_rules():
    rules = read("text", "section_rules.json")
    for header, name in rules["names"].items():
        assert section_name(header) == section_name(f" {header.upper()} ") == name
    for phrase in rules["findings_phrases"]:
        assert section_name(f"SOME {phrase.upper()} OF IT") == "findings"
    for place, word in enumerate(rules["contains"]):
        others = " ".join(rules["contains"][place:][::-1])
        # the first word in the list wins, and it wins over the phrases
        assert section_name(f"PORTABLE {others}") == word
    assert section_name("A HEADER OF NO RULE") == "a header of no rule"


def test_the_studies_with_exceptions_are_the_published_ones():
    published = read("text", "mimic_exceptions.json")
    misplaced = {}
    for name, studies in mimic.MISPLACED.items():
        misplaced |= {f"s{study}": name for study in studies.split()}
    assert misplaced == published["section_names"]
    assert {f"s{study}": list(span) for study, span in mimic.SPANS.items()} == published["spans"]


def test_a_study_with_an_exception_has_findings_alone():
    report = REPORT.format("Clear.", "Normal.") + "x" * 900
    assert sections(report, "50525523") == {"findings": report[201:349].strip()}
    assert sections(report, "57936451") == {"findings": "___F with\n dyspnea"}
    assert sections(report, "58235663") == {"findings": ""}
    # the findings should be in a section "note", which this report lacks
    assert sections(report, "56451190") == {"findings": ""}
    assert set(sections(report, "50000001")) > {"findings", "impression", "indication", "examination"}


PIECES = [
    *("FINDINGS:", "IMPRESSION:", "IMPRESSON:", "HISTORY :", "COMPARISON:", "A NEW HEADER:", "CHEST, TWO VIEWS:"),
    *("EXAM:", "\n ", "\n ", "\n ", "\n \n ", "\n", " ", "  ", "", "\r\n ", "\t", "NO:", "é", "10:35", "(", "A/B: "),
    *("The heart is normal.", "ET tube: satisfactory.", "___", "lower case header:"),
]  # fmt: skip
HEADERS = r"(\s*[A-Z ()/,-]+:\s)*"


def test_no_text_is_lost_and_none_invented():
    draw, kinds = random.Random(0), Counter()
    for _ in range(3000):
        text = "".join(draw.choices(PIECES, k=draw.randrange(25)))
        parts = split_report(text)
        # around the parts there is nothing but headers and white space
        between = HEADERS + r"\s*"
        assert re.fullmatch(between + between.join(re.escape(part.text) for part in parts) + between, text), text
        assert all(part.text.strip() for part in parts if part.name in ("findings", "impression"))
        kinds.update(part.name for part in parts)
    assert all(kinds[name] > 50 for name in ("findings", "impression", "history", "full report", "last_paragraph"))


def test_line_ends_are_translated_before_characters_are_counted(tmp_path):
    report = REPORT.format("Words.\n " * 40, "None.")
    for end in ("\n", "\r\n", "\r"):
        hospital = Hospital(tmp_path / repr(end))
        hospital.report(17069955, 51410602, report.replace("\n", end))
        hospital.image(17069955, 51410602, "a", "21800101", split="test")
        root = hospital.close()
        assert run_prepare("mimic-cxr", "--root", root, "--out", root, "--exceptions") == 0
        (question,) = read_lines(root / "findings_test_questions.jsonl")
        assert question["reference"] == " ".join(report[47:320].split())


def test_the_prompt_is_the_published_one():
    query = read("libra-7b", "case0", "expected.json")["query"]
    report = {"history": "cough, fever.", "indication": "65 year old\n woman   with dyspnea.", "findings": "Clear."}
    assert prompt("findings", report) == query
    turn = read("training", "records.json")[2]["conversations"][0]["value"]
    assert "<image>\n" + prompt("findings", {"history": "Chest tightness.", "indication": " \n"}) == turn
    assert prompt("impression", {}) == "Provide a detailed description of the impression in the radiology image."


def test_the_prompt_repeats_all_four_sections_in_the_order_of_the_published_figure():
    report = {"technique": "PA view.", "comparison": "None.", "history": "Asthma.", "indication": "Cough."}
    context = "Indication: Cough. History: Asthma. Comparison: None. Technique: PA view."
    assert prompt("findings", report) == f"{mimic.PROMPTS['findings']} Following clinical context: {context}"


def test_a_question_repeats_the_sections_that_are_chosen(odd, tmp_path, capsys):
    command = "mimic-cxr", "--root", odd, "--section", "findings", "--out"
    assert run_prepare(*command, tmp_path / "one", "--context", "history,technique") == 0
    question = read_lines(tmp_path / "one" / "findings_train.jsonl")[0]["conversations"][0]["value"]
    assert question == f"<image>\n{mimic.PROMPTS['findings']}"
    with pytest.raises(SystemExit):
        run_prepare(*command, tmp_path / "two", "--context", "findings")
    assert "'findings' is none of indication" in capsys.readouterr().err


def test_an_image_without_a_view_is_frontal_if_its_code_says_so(tmp_path):
    hospital = Hospital(tmp_path / "hospital")
    hospital.report(10000001, 1, REPORT.format("Clear.", "Normal."))
    views = {"a": ("", "postero-anterior"), "b": ("", "Antero-posterior"), "c": ("", "lateral"), "d": ("LATERAL", "")}
    for name, (view, _) in views.items():
        hospital.image(10000001, 1, name, "21800101", view=view)
    codes = ["ViewCodeSequence_CodeMeaning", *(code for _, code in views.values())]
    for row, code in zip(hospital.metadata, codes, strict=True):
        row.append(code)
    assert run_prepare("mimic-cxr", "--root", hospital.close(), "--out", tmp_path / "out") == 0
    assert [record["id"] for record in read_lines(tmp_path / "out" / "findings_train.jsonl")] == ["a", "b"]


DATES = ["21800101", "21800102", "21791231", "21800301", ""]
TIMES = [math.inf, 5.5, 80000.0, 120000.0]


def random_images(draw):
    names = draw.sample(range(100), draw.randrange(9))
    return [Image(draw.choice(DATES), draw.choice(TIMES), f"{name:02}") for name in names]


def brute_priors(images):
    """The prior of each image: the latest of all images of earlier dates."""
    pairs = {}
    for image in images:
        pairs[image] = None
        for other in images:
            if other.date and other.date < image.date and (pairs[image] is None or other > pairs[image]):
                pairs[image] = other
    return pairs


def test_priors_are_those_of_a_double_loop():
    draw, with_prior = random.Random(1), 0
    for _ in range(3000):
        images = random_images(draw)
        assert dict(priors(images)) == brute_priors(images)
        assert [image for image, _ in priors(images)] == sorted(images)
        with_prior += sum(prior is not None for _, prior in priors(images))
    assert with_prior > 3000


def test_every_image_becomes_a_record_with_its_prior(tmp_path, capsys):
    draw, hospital, truth = random.Random(2), Hospital(tmp_path / "hospital"), {}
    for patient in range(60):
        subject, split = 10000000 + 37 * patient, draw.choices(["train", "validate", "test"], [3, 1, 1])[0]
        images = []
        for image in random_images(draw):
            dicom = hashlib.md5(f"{patient} {image.dicom}".encode()).hexdigest()
            images.append(image._replace(dicom=dicom))
        # the metadata is in no order; all images of a date are of one study
        for image in draw.sample(images, len(images)):
            study, time = 50000000 + 10 * patient + DATES.index(image.date), str(image.time).replace("inf", "")
            hospital.report(subject, study, REPORT.format(f"Seen on {image.date or 'a day'}.", "As above."))
            hospital.image(subject, study, image.dicom, image.date, time, split=split)
            truth[image.dicom] = split, brute_priors(images)[image], f"Seen on {image.date or 'a day'}."
    root, out = hospital.close(), tmp_path / "out"
    assert run_prepare("mimic-cxr", "--root", root, "--out", out) == 0

    ids = {"train": set(), "validate": set(), "test": set()}
    examples = []
    for split in ("train", "validate"):
        for record in read_lines(out / f"findings_{split}.jsonl"):
            examples.append((split, record["id"], record["image"], record["conversations"][1]["value"]))
    for split in ("validate", "test"):
        for question in read_lines(out / f"findings_{split}_questions.jsonl"):
            examples.append((split, question["question_id"], question["image"], question["reference"]))
    for split, dicom, images, answer in examples:
        _, prior, text = truth[dicom]
        names = [dicom, prior.dicom] if prior else [dicom]
        assert [re.search(r"(\w+)\.jpg", image)[1] for image in images] == names
        assert all((root / image).is_file() for image in images)
        assert answer == text
        ids[split].add(dicom)
    for split in ids:
        assert ids[split] == {dicom for dicom, (name, _, _) in truth.items() if name == split}

    # the printed table counts the same
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("findings_train.jsonl"))
    with_prior = sum(truth[dicom][1] is not None for dicom in ids["train"])
    assert row.split()[3:5] == [str(len(ids["train"])), str(with_prior)]


@pytest.fixture
def odd(tmp_path):
    """A hospital in which everything that can be wrong is."""
    hospital = Hospital(tmp_path / "odd")
    one, two, three = 10000001, 11000002, 12000003
    hospital.report(one, 1, REPORT.format("First.\n FINDINGS:  Café\n is closed.", "None."), "latin-1")
    hospital.report(one, 2, REPORT.format("Later.", "Better."))
    hospital.report(one, 3, "")
    hospital.report(one, 5, REPORT.format("___", "Lone."))
    hospital.report(two, 57936451, REPORT.format("Kept out.", "Kept out."))
    hospital.report(three, 7, REPORT.format("Tested.", "Fine."))
    hospital.image(one, 1, "a", "21800101", 90000)
    hospital.image(one, 1, "b", "21800101", 80000, suffix=".dcm")
    hospital.image(one, 1, "lateral", "21800101", 235959, view="LATERAL")
    hospital.image(one, 1, "unseen", "21800101", 235959, suffix="")
    hospital.image(one, 1, "void", "21800101", 235959, data=b"")
    hospital.image(one, 2, "c", "21800102")
    hospital.image(one, 3, "d3", "21800105")
    hospital.image(one, 5, "d5", "21800105")
    hospital.image(two, 6, "e0", "21800100", split="validate")
    hospital.image(two, 57936451, "e1", "21800102", split="validate")
    hospital.image(three, 7, "f", "21800101", split="test")
    hospital.image(three, 7, "f", "21700101", view="LATERAL", split="")
    hospital.image(three, 7, "g", "", split="test")
    hospital.image(three, 7, "nosplit", "21800101", split="")
    hospital.image(three, 7, "elsewhere", "21800101", split="holdout")
    hospital.metadata += [["x", "", 7, "PA", 9, "21800101", ""], ["../x", 1, 7, "PA", 9, "", ""], ["short"]]
    return hospital.close()


def test_records_have_the_published_format(odd, tmp_path):
    assert run_prepare("mimic-cxr", "--root", odd, "--out", tmp_path, "--exceptions") == 0
    folder = "files/p10/p10000001"
    question = mimic.PROMPTS["findings"] + " Following clinical context: Indication: ___F with dyspnea"
    turns = lambda answer: [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    # "b" is the earlier one of its day, and the last findings of a report count
    assert read_lines(tmp_path / "findings_train.jsonl") == [
        {"id": "b", "image": [f"{folder}/s1/b.dcm"], "conversations": turns("Café is closed.")},
        {"id": "a", "image": [f"{folder}/s1/a.jpg"], "conversations": turns("Café is closed.")},
        {"id": "c", "image": [f"{folder}/s2/c.jpg", f"{folder}/s1/a.jpg"], "conversations": turns("Later.")},
    ]
    assert read_lines(tmp_path / "findings_validate_questions.jsonl") == [{
        "question_id": "e1",
        "image": ["files/p11/p11000002/s57936451/e1.jpg", "files/p11/p11000002/s6/e0.jpg"],
        "text": mimic.PROMPTS["findings"],
        "reference": "___F with dyspnea",
    }]  # fmt: skip


def test_what_is_odd_is_left_out_and_counted(odd, tmp_path, capsys):
    assert run_prepare("mimic-cxr", "--root", odd, "--out", tmp_path) == 0
    impressions = read_lines(tmp_path / "impression_train.jsonl")
    assert [record["id"] for record in impressions] == ["b", "a", "c", "d5"]
    tested = read_lines(tmp_path / "findings_test_questions.jsonl")
    assert [(question["question_id"], len(question["image"])) for question in tested] == [("g", 1), ("f", 1)]
    # without a record there is no file
    assert not (tmp_path / "impression_validate.jsonl").exists()
    assert set(re.findall(r"^ *(\d+  .*)$", capsys.readouterr().out, re.M)) == {
        "2  metadata rows without a readable dicom, subject or study id",
        "1  metadata rows with the dicom id of an earlier row",
        "1  rows of mimic-cxr-2.0.0-metadata.csv.gz with too few or too many fields",
        "1  images that are not frontal (view AP or PA, or its code)",
        "2  frontal images outside of train, validate, test",
        "2  frontal images missing or empty on disk",
        f"1  {mimic.DICOM_HINT}",
        "1  studies without a report",
        "1  studies with a rule of their own (left out, as in the published table of sections; --exceptions)",
        "4  images of a study without findings",
        "3  images of a study without impression",
    }


def test_a_report_that_may_never_end_is_refused(odd, tmp_path, capsys):
    report = odd / "files/p12/p12000003/s7.txt"
    report.unlink()
    os.mkfifo(report)
    assert run_prepare("mimic-cxr", "--root", odd, "--out", tmp_path / "out") == 2
    assert "s7.txt is a pipe" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_one_section_alone_and_reports_elsewhere(odd, tmp_path):
    Hospital(tmp_path / "reports").report(12000003, 7, REPORT.format("From elsewhere.", ""))
    flags = "--out", tmp_path / "out", "--reports", tmp_path / "reports", "--section", "findings"
    assert run_prepare("mimic-cxr", "--root", odd, *flags) == 0
    (file,) = (tmp_path / "out").iterdir()
    assert {question["reference"] for question in read_lines(file)} == {"From elsewhere."}


def test_a_second_run_makes_only_what_is_missing(odd, tmp_path, capsys):
    assert run_prepare("mimic-cxr", "--root", odd, "--out", tmp_path) == 0
    made = {path: path.read_bytes() for path in tmp_path.glob("*.jsonl")}
    gone, kept = tmp_path / "findings_test_questions.jsonl", tmp_path / "findings_train.jsonl"
    gone.unlink()
    inode = kept.stat().st_ino
    capsys.readouterr()
    assert run_prepare("mimic-cxr", "--root", odd, "--out", tmp_path) == 0
    printed = capsys.readouterr()
    assert kept.name in printed.err and gone.name not in printed.err
    assert kept.name in printed.out and gone.name in printed.out
    assert {path: path.read_bytes() for path in tmp_path.glob("*.jsonl")} == made and kept.stat().st_ino == inode
