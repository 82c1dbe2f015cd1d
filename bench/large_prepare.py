"""Time and peak memory on made-up inputs of the size of MIMIC-CXR and larger; a command of its own.

    python -m bench.large_prepare [ROWS …]          (377,110 images and 1,200,000 by default; needs 3 GB in TMPDIR)

First the cache: an image of 2,544 × 3,056 decoded, as a frame of 518 px from its file, and the same frame from the
cache. Then every number of rows, each in a process of its own: the metadata's data base, a CSV of as many difference
questions (whose studies all stand for one image on disk), and a JSON list and a JSONL of as many records, opened as
training opens them, and through `prepare.py check`. Importing torch is some 240 MiB of each.
"""

import gzip
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEADER = "dicom_id,subject_id,study_id,ViewPosition,StudyDate,StudyTime\n"
TURNS = [
    {"from": "human", "value": "<image>\nWhat has changed?"},
    {"from": "gpt", "value": "The effusion is new. " * 9},
]


def inputs(folder: Path, rows: int):
    image = folder / "files" / "p10" / "p10000000" / "s50000000" / "0.jpg"
    image.parent.mkdir(parents=True)
    image.write_bytes(b"x")
    (image.parents[1] / "s50000000.txt").write_text("\n FINDINGS:  Clear.\n")
    with (
        gzip.open(folder / "mimic-cxr-2.0.0-metadata.csv.gz", "wt", 1) as metadata,
        gzip.open(folder / "mimic-cxr-2.0.0-split.csv.gz", "wt", 1) as split,
        open(folder / "questions.csv", "w") as questions,
        open(folder / "list.json", "w") as whole,
        open(folder / "lines.jsonl", "w") as lines,
    ):
        metadata.write(HEADER)
        split.write("dicom_id,study_id,subject_id,split\n")
        questions.write("study_id,subject_id,ref_id,question_type,question,answer,split\n")
        for row in range(rows):
            patient, study, dicom = 10000000 + row // 6, 50000000 + row // 2, f"{row * 2654435761 % 2**64:044x}"
            dicom = dicom if row else "0"
            metadata.write(f"{dicom},{patient},{study},{('PA', 'LATERAL')[row % 2]},2180{row % 12 + 1:02}01,{row}.5\n")
            split.write(f"{dicom},{study},{patient},train\n")
            questions.write(f"50000000,10000000,50000000,difference,what has changed?,it is {row},train\n")
            record = json.dumps({"id": row, "image": [f"{row}.jpg", "0.jpg"], "conversations": TURNS})
            whole.write(("," if row else "[") + record + "\n")
            lines.write(record + "\n")
        whole.write("]")


CACHE = """
import dataclasses, json, pathlib, sys, time, PIL.Image, data, encoder, phantom, prepare
folder, images = pathlib.Path(sys.argv[1]), 24
settings = {"size": {"shortest_edge": 518}, "crop_size": {"height": 518, "width": 518}}
settings |= {"do_center_crop": True, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
(folder / "preprocessor_config.json").write_text(json.dumps(settings))
for number in range(images):
    state = phantom.history(0, number)[0]
    drawn = PIL.Image.fromarray(phantom.picture(state, state.view, 1024))
    drawn.resize((2544, 3056), PIL.Image.BICUBIC).save(folder / f"{number}.jpg", quality=95)
names = [f"{number}.jpg" for number in range(images)]
(folder / "records.jsonl").write_text("".join(json.dumps({"image": name}) + "\\n" for name in names))
flags = ["--records", folder / "records.jsonl", "--image-folder", folder, "--model", folder, "--out", folder / "cache"]
assert prepare.main(prepare.parse(["cache", *map(str, flags)])) == 0
config = encoder.pixel_config(settings, folder, "black")
files, cache = data.ImageFolder(folder, config), data.ImageCache(folder / "cache", config)
ways = {"decoded": lambda name: data.load_image(folder / name), "frame, file": files.frame, "frame, cache": cache.frame}
for way, read in ways.items():
    rounds = 20 if read == cache.frame else 1
    begin = time.monotonic()
    for name in names * rounds:
        read(name)
    print(f"{way:<34}{(time.monotonic() - begin) / images / rounds * 1000:7.2f} ms an image")
"""

OPEN = "import sys, data; data.check(data.Records(sys.argv[1]), data.Record); status = 0;"
RUN = "import sys, prepare; status = prepare.main(prepare.parse(sys.argv[1:]));"


def measured(label: str, arguments, code: str = RUN):
    begin = time.monotonic()
    code += "import resource; sys.stdout.flush();"
    code += "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr); sys.exit(status)"
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True)
    *_, peak = done.stderr.split()
    print(
        f"{label:<34}{time.monotonic() - begin:7.1f} s{int(peak) / 1024:8.0f} MiB   status {done.returncode}",
        flush=True,
    )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        subprocess.run([sys.executable, "-c", CACHE, name], cwd=ROOT, check=True)
    for rows in [int(number) for number in sys.argv[1:]] or [377_110, 1_200_000]:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            inputs(folder, rows)
            print(f"{rows:,} rows", flush=True)
            vqa = "diff-vqa", "--root", folder, "--questions", folder / "questions.csv", "--out", folder
            measured("metadata, difference questions", vqa)
            measured("metadata, one report", ("mimic-cxr", "--root", folder, "--out", folder))
            for file in ("list.json", "lines.jsonl"):
                measured(f"open {file}", [folder / file], OPEN)
                measured(f"check {file}", ("check", folder / file))
