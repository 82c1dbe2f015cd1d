"""The phantom hospital against the published layout, the published keyword list, and its own hidden truth."""

import csv
import gzip
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict

import numpy as np
import pytest
from conftest import ROOT, read
from PIL import Image

from phantom import hospital as phantom

PATIENTS = 60
KEYWORDS = set(read("text", "temporal_f1.json")["keywords"])
WORDS = {"new": {"new"}, "worse": {"increased", "worsened"}, "improved": {"decreased", "improved"},
         "unchanged": {"unchanged"}, "resolved": {"resolved"}, "removed": {"removal"}}  # fmt: skip


@pytest.fixture(scope="module")
def hospital(tmp_path_factory):
    out = tmp_path_factory.mktemp("hospital") / "phantom"
    phantom.write(out, PATIENTS, seed=3, size=48, workers=2)
    return out


def tree(folder):
    """Relative path -> hash of every file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def table(path):
    with gzip.open(path, "rt", newline="") if path.suffix == ".gz" else open(path, newline="") as file:
        return list(csv.DictReader(file))


def truths(folder):
    return [json.loads(line) for line in (folder / "truth.jsonl").read_text().splitlines()]


def sections(report):
    """Name -> text by the published rules, for reports whose headers are plain ones."""
    names = read("text", "section_rules.json")["names"]
    parts = re.split(r"\n ([A-Z ()/,-]+):\s", report)
    return {names[name.lower()]: " ".join(text.split()) for name, text in zip(parts[1::2], parts[2::2], strict=True)}


def states(patients, seed=0):
    return [state for patient in range(patients) for state in phantom.history(seed, patient)]


# ------------------------------------------------------------------------------------------------------------- files


def test_the_same_bytes_on_any_number_of_workers_and_after_a_loss(tmp_path, hospital):
    one = tmp_path / "one"
    phantom.write(one, 5, seed=3, size=48, workers=1)
    kept = next(one.glob("files/p*/p*"))
    before = kept.stat().st_mtime_ns
    lost = sorted(one.glob("files/p*/p*"))[-1]
    for path in sorted(lost.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    lost.rmdir()
    seen = []
    phantom.write(one, PATIENTS, seed=3, size=48, workers=3, progress=lambda *count: seen.append(count))
    assert tree(one) == tree(hospital)
    assert kept.stat().st_mtime_ns == before
    assert seen == [(done, PATIENTS) for done in range(5, PATIENTS + 1)]


def test_the_same_bytes_after_kills(tmp_path, hospital):
    out = tmp_path / "killed"
    code = "import phantom.hospital as phantom\n"
    code += f"if __name__ == '__main__': phantom.write({str(out)!r}, {PATIENTS}, 3, 48, workers=2)"
    script = tmp_path / "run.py"
    script.write_text(code)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for patients in (1, 30):
        process = subprocess.Popen([sys.executable, script], env=environment)
        while len(list(out.glob("files/p*/p*"))) < patients and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run([sys.executable, script], env=environment, check=True)
    assert tree(out) == tree(hospital)


def test_a_full_disk_is_one_error_and_leaves_no_part(tmp_path):
    out, limit = tmp_path / "full", 8000
    code = f"import phantom.hospital as phantom, resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit},) * 2); "
    code += f"phantom.write({str(out)!r}, 3, size=400, workers=1)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert f"OSError: [Errno 27] File too large: '{out}" in run.stderr
    assert [path.name for path in out.rglob("*") if path.is_file()] == ["phantom.json"]
    assert not list(out.glob("files/*/*"))


def test_mistakes_are_named(tmp_path, hospital):
    with pytest.raises(ValueError, match=r'phantom\.json says .*"seed": 3.*not .*"seed": 4.*another folder'):
        phantom.write(hospital, 1, seed=4, size=48)
    (tmp_path / "precious.txt").touch()
    with pytest.raises(ValueError, match="is not empty"):
        phantom.write(tmp_path, 1)
    for wrong in ({"patients": 0}, {"patients": 1, "size": 8}, {"patients": 1, "seed": -1}):
        with pytest.raises(ValueError, match="out of range"):
            phantom.write(tmp_path / "new", **wrong)
    assert not (tmp_path / "new").exists()


def test_the_layout_is_that_of_mimic_cxr(hospital):
    metadata, split = (table(hospital / f"mimic-cxr-2.0.0-{name}.csv.gz") for name in ("metadata", "split"))
    assert list(metadata[0]) == [
        "dicom_id", "subject_id", "study_id", "PerformedProcedureStepDescription", "ViewPosition", "Rows", "Columns",
        "StudyDate", "StudyTime", "ProcedureCodeSequence_CodeMeaning", "ViewCodeSequence_CodeMeaning",
        "PatientOrientationCodeSequence_CodeMeaning",
    ]  # fmt: skip
    assert list(split[0]) == ["dicom_id", "study_id", "subject_id", "split"]
    assert [row["dicom_id"] for row in metadata] == [row["dicom_id"] for row in split]
    images = {str(path.relative_to(hospital)) for path in hospital.rglob("*.jpg")}
    reports = {str(path.relative_to(hospital)) for path in hospital.rglob("*.txt")}
    folder = lambda row: f"files/p{row['subject_id'][:2]}/p{row['subject_id']}/s{row['study_id']}"
    assert images == {f"{folder(row)}/{row['dicom_id']}.jpg" for row in metadata} and len(images) == len(metadata)
    assert reports == {f"{folder(row)}.txt" for row in metadata}
    for row in metadata:
        assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{8}){4}", row["dicom_id"])
        assert re.fullmatch(r"1\d{7}", row["subject_id"]) and re.fullmatch(r"5\d{7}", row["study_id"])
        assert re.fullmatch(r"\d{6}\.\d{3}", row["StudyTime"]) and time.strptime(row["StudyDate"], "%Y%m%d")
    with Image.open(hospital / sorted(images)[0]) as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "L", (48, 48))
        assert {(row["Rows"], row["Columns"]) for row in metadata} == {("48", "48")}

    frontal = Counter(row["study_id"] for row in metadata if row["ViewPosition"] in ("AP", "PA"))
    lateral = Counter(row["study_id"] for row in metadata if row["ViewPosition"] == "LATERAL")
    assert set(frontal.values()) == set(lateral.values()) == {1} and set(lateral) < set(frontal)
    truth = truths(hospital)
    assert {line["dicom_id"] for line in truth} == {
        row["dicom_id"] for row in metadata if row["ViewPosition"] != "LATERAL"
    }
    assert any(str(line["prior_study_id"]) in lateral and str(line["study_id"]) in lateral for line in truth)
    # a prior is not found by taking any image: where a study has two, either may come last
    order = {row["study_id"]: row["ViewPosition"] for row in sorted(metadata, key=lambda row: row["dicom_id"])}
    assert {order[study] == "LATERAL" for study in lateral} == {True, False}

    of_patient = defaultdict(set)
    for row in split:
        of_patient[row["subject_id"]].add(row["split"])
    assert len(of_patient) == PATIENTS and all(len(splits) == 1 for splits in of_patient.values())
    assert Counter(next(iter(splits)) for splits in of_patient.values()) == {"train": 48, "validate": 6, "test": 6}


def test_the_truth_s_changes_follow_from_its_states(hospital):
    days = {row["study_id"]: row["StudyDate"] for row in table(hospital / "mimic-cxr-2.0.0-metadata.csv.gz")}
    previous = None
    for line in truths(hospital):
        if previous is None or previous["subject_id"] != line["subject_id"]:
            assert line["prior_study_id"] is None and not line["changes"]
        else:
            assert line["prior_study_id"] == previous["study_id"]
            assert days[str(previous["study_id"])] < days[str(line["study_id"])]
            changes = {}
            for kind, gone in (("findings", "resolved"), ("devices", "removed")):
                was, now = previous[kind], line[kind]
                changes |= {name: gone for name in was.keys() - now.keys()}
                changes |= {name: "new" for name in now.keys() - was.keys()}
                for name in was.keys() & now.keys():
                    before, after = was[name].pop("severity", 0), now[name].get("severity", 0)
                    assert was[name].items() <= now[name].items()
                    changes[name] = "worse" if after > before else "improved" if after < before else "unchanged"
            assert line["changes"] == changes
        previous = line


def test_ids_are_unique_and_a_third_of_studies_have_no_prior():
    every = states(1500)
    for ids in (
        [s.study_id for s in every],
        [s.dicom_id for s in every] + [s.lateral_id for s in every if s.lateral_id],
    ):
        assert len(set(ids)) == len(ids)
    assert len({state.subject_id for state in every}) == 1500
    assert abs(sum(state.prior_study_id is None for state in every) / len(every) - 1 / 3) < 0.03
    assert {state.number for state in every} == set(range(6))
    assert {name for state in every for name in state.present} == phantom.FINDINGS.keys() | phantom.DEVICES.keys()


def test_a_single_severity_hardly_tells_the_change():
    """The best guess from severity alone, among new, worse, unchanged and improved, against a blind one."""
    counts = defaultdict(Counter)
    for state in states(1500):
        for name, change in state.changes.items():
            if name in phantom.FINDINGS and change != "resolved":
                counts[int(state.present[name].severity * 8)][change] += 1
    total = sum(counts.values(), Counter())
    assert max(total.values()) / total.total() < 0.35
    assert sum(max(bin.values()) for bin in counts.values()) / total.total() < 0.42


# ------------------------------------------------------------------------------------------------------------- texts


def test_reports_say_the_truth_in_the_published_form_and_words():
    lengths, levels = [], Counter()
    for state in states(300):
        text = phantom.report(state)
        assert all(line.startswith(" ") for line in text.splitlines()) and "___" in text
        parts = sections(text)
        assert {"examination", "technique", "comparison", "findings", "impression"} < parts.keys()
        assert {"indication", "history"} & parts.keys()
        assert ("None" in parts["comparison"]) == (state.prior_study_id is None)
        assert ("LAT" in parts["examination"]) == (state.lateral_id is not None)
        findings = parts["findings"]
        lengths.append(len(findings.split()))
        said = phantom.read_report(findings)
        assert {name: told["change"] for name, told in said.items()} == {
            name: state.changes.get(name) for name in state.present | state.gone
        }

        # a name is in one sentence that denies nothing, with its side and a keyword of its change; others are not
        sentences = [sentence for sentence in findings.lower().split(".") if sentence.strip()]
        for name in phantom.FINDINGS | phantom.DEVICES:
            holds = [s for s in sentences if name in s and not re.search(r"\bno\b", s)]
            finding = (state.present | state.gone).get(name)
            assert len(holds) == (finding is not None), (name, findings)
            if finding:
                words = KEYWORDS & set(re.findall("[a-z]+", holds[0]))
                assert len(words) == (name in state.changes) and words <= WORDS.get(state.changes.get(name), set())
                assert finding.side is None or name == "edema" or finding.side in holds[0]
            if finding and name in phantom.FINDINGS and name not in state.gone:
                levels.update((word, finding.severity) for word in ("small", "moderate", "large") if word in holds[0])
        said = KEYWORDS & set(re.findall("[a-z]+", parts["impression"].lower()))
        assert said <= set().union(*(WORDS[change] for change in state.changes.values())), text
    assert 30 < np.mean(lengths) < 45 and min(lengths) >= 15 and max(lengths) <= 80
    range_of = lambda word: [severity for said, severity in levels if said == word]
    assert max(range_of("small")) < min(range_of("moderate")) <= max(range_of("moderate")) < min(range_of("large"))


def test_what_a_model_may_write_is_read():
    for text in ("", "The heart is normal. No pleural effusion or pneumothorax."):
        assert phantom.read_report(text) == {}
    said = phantom.read_report(
        "A new small right pleural effusion is seen. No pneumothorax or edema, but there is moderate cardiomegaly; "
        "The left upper lobe\nconsolidation has resolved. 4.5 cm above the carina an endotracheal tube without nodule."
    )
    assert said == {
        "pleural effusion": {"change": "new", "side": "right", "level": 0},
        "cardiomegaly": {"change": None, "side": None, "level": 1},
        "consolidation": {"change": "resolved", "side": "left", "level": None},
        "endotracheal tube": {"change": None, "side": None, "level": None},
    }


def test_questions_are_answered_from_the_truth(hospital):
    truth = {line["study_id"]: line for line in truths(hospital)}
    pairs, types = table(hospital / "mimic_pair_questions.csv"), Counter()
    levels, kinds = defaultdict(list), defaultdict(list)
    assert list(pairs[0]) == ["study_id", "subject_id", "ref_id", "question_type", "question", "answer", "split"]
    for row in pairs:
        line, answer = truth[int(row["study_id"])], row["answer"]
        types[row["question_type"]] += 1
        assert int(row["ref_id"]) == line["prior_study_id"] and int(row["subject_id"]) == line["subject_id"]
        assert row["split"][:3] == line["split"][:3]
        asked = next((name for name in phantom.FINDINGS if name in row["question"]), None)
        match row["question_type"]:
            case "presence":
                assert answer == ("yes" if asked in line["findings"] else "no")
            case "abnormality":
                assert {name for name in phantom.FINDINGS if name in answer} == line["findings"].keys()
            case "view":
                assert answer == f"{line['view']} view"
            case "location":
                assert answer == "{side} {place}".format(**line["findings"][asked])
            case "level":
                order = [("small", "mild"), ("moderate",), ("large", "severe")]
                levels[next(i for i, words in enumerate(order) if answer in words)].append(
                    line["findings"][asked]["severity"]
                )
            case "type":
                kinds[answer].append(line["findings"][asked]["severity"])
            case "difference":
                changed = {name for name, change in line["changes"].items() if change != "unchanged"}
                assert {name for name in truth_names() if name in answer} == changed
    assert max(levels[0]) < min(levels[1]) <= max(levels[1]) < min(levels[2])
    assert max(kinds["interstitial"]) < min(kinds["alveolar"]) and len(kinds) == 2
    with_prior = sum(line["prior_study_id"] is not None for line in truth.values())
    assert types["difference"] == with_prior and min(types.values()) > 5 and len(types) == 7
    assert len(pairs) > 4 * with_prior

    empty = 0
    for name, split in (("train", "train"), ("valid", "validate"), ("test", "test")):
        records = json.loads((hospital / f"cxr_vqa_{name}.json").read_text())
        assert {record["study_id"] for record in records} == {s for s, line in truth.items() if line["split"] == split}
        for record in records:
            line = truth[record["study_id"]]
            assert record["image_id"] == line["dicom_id"] and (hospital / "files" / record["image_path"]).exists()
            assert isinstance(record["answer"], list) and {"question", "semantic_type", "content_type"} < record.keys()
            if record["content_type"] == "abnormality":
                assert set(record["answer"]) == line["findings"].keys()
                empty += not record["answer"]
    assert empty


def truth_names():
    return [*phantom.FINDINGS, *phantom.DEVICES]


# ------------------------------------------------------------------------------------------------- dicom and preview


def test_dicom_holds_the_same_pixels(tmp_path):
    pydicom = pytest.importorskip("pydicom")
    phantom.write(tmp_path / "a", 2, size=33, workers=1, dicom=True)
    phantom.write(tmp_path / "b", 2, size=33, workers=1, dicom=True)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    for state in states(2):
        path = next((tmp_path / "a").rglob(f"{state.dicom_id}.dcm"))
        data = pydicom.dcmread(path)
        assert np.array_equal(data.pixel_array, phantom.picture(state, state.view, 33))
        assert (data.PatientID, data.ViewPosition) == (str(state.subject_id), state.view)
        assert path.with_suffix(".jpg").exists()


def test_the_preview_shows_the_images_of_the_files():
    sheet = phantom.preview(seed=3, patients=2, studies=3, size=100)
    assert sheet.mode == "RGB" and sheet.width == 3 * 106 + 6 and sheet.height > 200
    pixels = np.asarray(sheet)
    grey = pixels[..., 0]
    shown = {
        state.study_id
        for state in states(200, seed=3)
        if state.number == 0
        for picture in [phantom.picture(state, state.view, 100)]
        for top in np.flatnonzero((grey[:-99, 6] == picture[0, 0]) & (grey[99:, 6] == picture[99, 0]))
        if np.array_equal(grey[top : top + 100, 6:106], picture)
    }
    assert len(shown) == 2
    coloured = pixels.max(2).astype(int) - pixels.min(2) > 60
    assert coloured.any()
