"""Golden checkpoints and what the published implementation computes with them.

GOLDEN_DIR, where it is set, names a fuller set of the same layout than the copy in tests/golden.
"""

import csv
import functools
import gzip
import http.client
import io
import itertools
import json
import os
import resource
import sys
import threading
from pathlib import Path

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(os.environ.get("GOLDEN_DIR") or ROOT / "tests" / "golden").resolve()
XRAYS = GOLDEN.parent / "cxr"  # the real pair of case-cxr lies beside the full set only
sys.path.insert(0, str(ROOT))

from data import Study  # noqa: E402
from model import Libra  # noqa: E402
from tokenizer import TEMPLATES, render  # noqa: E402

FAMILIES = sorted(folder.parent.name for folder in GOLDEN.glob("*/model"))
LIBRA = ["libra-7b", "libra-3b"]


@functools.cache
def load(family: str) -> Libra:
    """A golden checkpoint in float32 on the CPU, read once. Tests must not change it."""
    return Libra.from_pretrained(GOLDEN / family / "model", device="cpu", dtype="float32")


def read_again(source, **options) -> Libra:
    """Any model in float32 on the CPU, read anew, so that a test may change it."""
    return Libra.from_pretrained(source, **dict(device="cpu", dtype="float32") | options)


@torch.no_grad()
def last_logits(libra: Libra, study: Study) -> torch.Tensor:
    """The logits [V] of the first token of a study's report, computed without a cache."""
    prompt = render([(f"{libra.image_text}\n{study.query}", None)], TEMPLATES[libra.template], libra.tokenizer)
    embeddings = libra.splice(prompt.ids, libra.embed_images(libra.preprocess(study.images())))
    return libra.logits(libra.decoder(embeddings[None], torch.arange(len(embeddings))[None])[0, -1])


def same_weights(one: Libra, other: Libra):
    """Both have the same parameters, bit for bit."""
    one, other = dict(one.named_parameters()), dict(other.named_parameters())
    assert one.keys() == other.keys()
    for name, parameter in one.items():
        assert parameter.dtype == other[name].dtype and torch.equal(parameter, other[name]), name


def change(file: Path, **fields):
    """Set fields of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def seconds_of_children() -> float:
    """CPU seconds of this process's children that have ended: the clock's would grow with what else runs."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def cases():
    """(family, case folder) of every golden case whose images are at hand."""
    folders = [(family, case) for family in FAMILIES for case in sorted((GOLDEN / family).glob("case*"))]
    return [(family, case) for family, case in folders if XRAYS.exists() or case.name != "case-cxr"]


def study_of(case: dict) -> Study:
    """The study of a golden case, as its expected.json describes it."""
    find = lambda name: (GOLDEN / "images" if name.endswith(".png") else XRAYS) / name
    return Study(find(case["current"]), find(case["prior"]) if case["prior"] else None, case["query"])


def relative(out: torch.Tensor, reference: torch.Tensor) -> float:
    return float((out - reference).norm() / reference.norm())


def read(*path: str):
    return json.loads(GOLDEN.joinpath(*path).read_text())


def training_record(question="Has it grown?", answer="It has.", image="0.png", id="1", **changes) -> dict:
    messages = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    return {"id": id, "image": image, "conversations": messages} | changes


def write_lines(path: Path, records) -> Path:
    """Write a JSONL file."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def one_line(capsys) -> str:
    """What was printed, which must be one line on stderr."""
    printed = capsys.readouterr()
    assert not printed.out and printed.err.count("\n") == 1, printed
    return printed.err


@pytest.fixture
def no_meteor(monkeypatch):
    """For tests of other scores: METEOR's data need not be there."""
    monkeypatch.setattr("evaluation.metrics.meteor_scorer", lambda: lambda prediction, reference: 0.5)


def run_prepare(*arguments) -> int:
    """The exit status of prepare.py."""
    import prepare

    return prepare.main(prepare.parse([str(argument) for argument in arguments]))


def picture(level: int, kind: str = "PNG") -> dict:
    """A small grey image as a row of a Hugging Face data set holds it."""
    file = io.BytesIO()
    Image.new("L", (4, 4), level).save(file, kind)
    return {"bytes": file.getvalue(), "path": None}


# a report whose findings and impression are to be filled in
REPORT = """                                 FINAL REPORT
 EXAMINATION:  CHEST (PA AND LAT)
 \n INDICATION:  ___F with
 dyspnea
 \n FINDINGS:  {}
 \n IMPRESSION:  {}
"""


class Hospital:
    """A folder laid out as MIMIC-CXR is, whose images are a few bytes."""

    def __init__(self, root):
        self.root = root
        self.metadata = [["dicom_id", "subject_id", "study_id", "ViewPosition", "Rows", "StudyDate", "StudyTime"]]
        self.split = [["dicom_id", "study_id", "subject_id", "split"]]

    def folder(self, subject, study) -> Path:
        folder = self.root / "files" / f"p{subject}"[:3] / f"p{subject}" / f"s{study}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def report(self, subject, study, text, encoding="utf-8"):
        self.folder(subject, study).with_suffix(".txt").write_bytes(text.encode(encoding))

    def image(self, subject, study, dicom, date, time="", view="PA", split="train", suffix=".jpg", data=b"x"):
        if suffix:
            (self.folder(subject, study) / f"{dicom}{suffix}").write_bytes(data)
        self.metadata.append([dicom, subject, study, view, 9, date, time])
        if split:
            self.split.append([dicom, study, subject, split])

    def close(self) -> Path:
        """Write the tables. Returns the root."""
        for name, rows in (("metadata", self.metadata), ("split", self.split)):
            with gzip.open(self.root / f"mimic-cxr-2.0.0-{name}.csv.gz", "wt", newline="") as file:
                csv.writer(file).writerows(rows)
        return self.root


@pytest.fixture
def seven():
    return load("libra-7b")


PAIR = [ROOT / "assets" / "current.png", ROOT / "assets" / "prior.png"]
FIRST_WORD = "Both"  # of the report on this pair


def dicom_of(image) -> bytes:
    """A grey image file as an uncompressed DICOM file of 8 bits."""
    from pydicom import Dataset, FileMetaDataset, uid

    picture = Image.open(image).convert("L")
    made = Dataset()
    made.file_meta = FileMetaDataset()
    made.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    made.file_meta.MediaStorageSOPClassUID = made.SOPClassUID = uid.DigitalXRayImageStorageForPresentation
    made.file_meta.MediaStorageSOPInstanceUID = made.SOPInstanceUID = "1.2.3"
    made.PhotometricInterpretation, made.SamplesPerPixel, made.PixelRepresentation = "MONOCHROME2", 1, 0
    made.Rows, made.Columns = picture.height, picture.width
    made.BitsAllocated, made.BitsStored, made.HighBit = 8, 8, 7
    made.WindowCenter, made.WindowWidth = 128, 256
    made.PixelData = picture.tobytes()
    file = io.BytesIO()
    made.save_as(file, enforce_file_format=True)
    return file.getvalue()


class Site:
    """app.py in a thread of this process, and an HTTP client that knows nothing of it but its port."""

    def __init__(self, *arguments):
        import app

        arguments = ["--port", "0", "--max-new-tokens", "200", "--device", "cpu", *arguments]
        if "--model" not in arguments:
            arguments += ["--model", str(ROOT / "assets" / "phantom")]
        self.service = app.make_service(app.parse(arguments))
        self.model = app.parse(arguments).model[0]
        self.port = self.service.listener.getsockname()[1]
        self.thread = threading.Thread(target=self.service.server.run, args=[[self.service.listener]])

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.service.server.should_exit = True
        self.thread.join()
        self.service.worker.end()

    def request(self, method: str, path: str, body=None, **headers) -> tuple[int, dict, bytes]:
        """(status, headers, body). A dict is sent as JSON; the name of a header has _ for -."""
        if isinstance(body, dict):
            body = json.dumps(body).encode()
            headers.setdefault("Content_Type", "application/json")
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        return response.status, dict(response.headers), response.read()

    def upload(self, image) -> str:
        """The name of an image, a path or bytes."""
        data = image if isinstance(image, bytes) else Path(image).read_bytes()
        status, _, body = self.request("POST", "/images", data)
        assert status == 200, body
        return json.loads(body)["name"]

    def open_stream(self, **question) -> http.client.HTTPResponse:
        """The response to a question, whose lines are what the server tells."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        if "conversation" not in question:
            question = {"model": self.model} | question
        connection.request("POST", "/ask", json.dumps(question), {"Content-Type": "application/json"})
        return connection.getresponse()

    def ask(self, **question) -> list[dict]:
        """All that the server tells about a question."""
        return [json.loads(line) for line in self.open_stream(**question)]

    def answer(self, **question) -> dict:
        """What `--json` prints, and the name of the conversation."""
        last = self.ask(**question)[-1]
        return json.loads(last["answer"]) | {"conversation": last["conversation"]}


class Gate:
    """Holds models back: each token of the loaded ones waits until the gate is open."""

    def __init__(self, monkeypatch):
        import app

        self.is_open = threading.Event()
        read = app.load

        def load(*arguments):
            libra = read(*arguments)
            step = libra.decode_step
            libra.decode_step = lambda *tokens: self.is_open.wait() and step(*tokens)
            return libra

        monkeypatch.setattr(app, "load", load)


@pytest.fixture
def gate(monkeypatch):
    gate = Gate(monkeypatch)
    yield gate
    gate.is_open.set()


def random_tensor(*shape, dtype=torch.float32, seed=0):
    """Normal numbers with a deviation of 1.5, so that no softmax over their products is flat."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul(1.5).to(dtype)


def attention_by_loops(q, k, v, segments=None, window=None, positions=None):
    """The oracle for attention: float64, one query at a time, over the keys that the rule lets it see.

    segments and positions are lists [B][S]; without segments everything is visible. Without positions the window counts
    places in the row. A query that sees nothing gets a sum over nothing: zeros.
    """
    (B, H, T, D), (H_kv, S) = q.shape, k.shape[1:3]
    q, k, v = q.double(), k.double(), v.double()
    outputs = []
    for b, h, t in itertools.product(range(B), range(H), range(T)):
        i, seen = S - T + t, list(range(S))
        if segments is not None:
            segment = segments[b]
            seen = [j for j in seen if j <= i and segment[j] != -1 and segment[j] in (0, segment[i])]
        if window is not None:
            place = range(S) if positions is None else positions[b]
            seen = [j for j in seen if place[i] - place[j] < window]
        head = h // (H // H_kv)
        keys, values = k[b, head, seen], v[b, head, seen]
        outputs.append((keys @ q[b, h, t] / D**0.5).softmax(0) @ values)
    return torch.stack(outputs).view(B, H, T, D)
