"""The page's server, asked by plain HTTP clients. Oracle: sample.py, which answers the same questions."""

import io
import json
import re
import signal
import socket
import subprocess
import sys
import time
from base64 import b64encode
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256

import numpy as np
import pytest
from conftest import FIRST_WORD, GOLDEN, PAIR, ROOT, Site, dicom_of, one_line
from PIL import Image

import sample
from data import FINDINGS_PROMPT, Study
from model import Libra
from sample import Chat, generate
from sources.mimic import with_context

pytest.importorskip("starlette", reason="no starlette: pip install -r requirements-app.txt")
pytest.importorskip("uvicorn", reason="no uvicorn: pip install -r requirements-app.txt")
import app
import page.safety
import page.work
from page.work import Shelf

PHANTOM = ROOT / "assets" / "phantom"


@pytest.fixture(scope="module")
def site():
    with Site() as site:
        yield site


@pytest.fixture(scope="module")
def phantom():
    return Libra.from_pretrained(PHANTOM, device="cpu")


@pytest.fixture(scope="module")
def names(site):
    """The example pair, uploaded."""
    return [site.upload(image) for image in PAIR]


def sentence(site, *request, **headers) -> tuple[int, str]:
    """The status and the sentence of a refusal."""
    status, _, body = site.request(*request, **headers)
    text = body.decode()
    return status, json.loads(text)["error"] if text.startswith("{") else text


# ------------------------------------------------------------------------------------------ reports


def test_the_answer_is_what_json_prints(site, names, capsys):
    events = site.ask(images=names)
    arguments = ["--model", str(PHANTOM), "--images", *map(str, PAIR), "--max-new-tokens", "200", "--device", "cpu"]
    assert sample.main(sample.parse([*arguments, "--json"])) == 0
    printed = json.loads(capsys.readouterr().out)
    answer = json.loads(events[-1]["answer"])
    assert list(answer) == list(printed) and answer["seconds"].keys() == printed["seconds"].keys()
    del answer["seconds"], printed["seconds"]
    assert answer == printed
    # it has come in pieces
    pieces = [event["text"] for event in events if "text" in event]
    assert len(pieces) > 10 and "".join(pieces) == printed["outputs"][0]["text"]


def test_sixteen_at_once_get_what_sample_gives(site, names, phantom):
    context = {"indication": "dyspnea", "comparison": "last week"}
    asked = with_context(FINDINGS_PROMPT, context)
    beams = dict(num_beams=3, num_return_sequences=2, max_new_tokens=40)
    questions = [
        ({}, Study(*PAIR), {}),
        ({"circumstance": "without the prior"}, Study(PAIR[0]), {}),
        ({"circumstance": "images exchanged"}, Study(PAIR[1], PAIR[0]), {}),
        ({"context": context}, Study(*PAIR, query=asked), {}),
        ({}, Study(*PAIR), beams),
        ({"question": "Is there an effusion?"}, Study(*PAIR, query="Is there an effusion?"), {}),
        *[({}, Study(*PAIR), dict(temperature=1.0, seed=seed, max_new_tokens=30)) for seed in range(10)],
    ]
    ask = lambda question: site.answer(images=names, options=question[2], **question[0])["outputs"]
    with ThreadPoolExecutor(16) as clients:
        answers = list(clients.map(ask, questions))
    for (_, study, options), outputs in zip(questions, answers, strict=True):
        expected = generate(phantom, study, **{"max_new_tokens": 200} | options)
        assert outputs == [vars(output) for output in expected]
    assert len({answer[0]["text"] for answer in answers}) > 8


def test_a_further_question_continues_the_conversation_with_and_without_its_cache(site, names, phantom, monkeypatch):
    chat, questions = Chat(phantom, Study(*PAIR)), [FINDINGS_PROMPT, "Is there an effusion?", "What has changed?"]
    expected = [chat.ask(question, max_new_tokens=30).text for question in questions]
    for caches in (4, 1):
        monkeypatch.setattr(page.work, "CACHES", caches)
        answer, texts = {}, []
        for question in questions:
            known = {"conversation": answer["conversation"]} if answer else {"images": names}
            answer = site.answer(question=question, options={"max_new_tokens": 30}, **known)
            texts.append(answer["outputs"][0]["text"])
            if caches == 1:  # somebody else takes the only one
                site.answer(images=names, options={"max_new_tokens": 1})
        assert texts == expected


def test_of_several_models_one_is_loaded_at_a_time_and_a_conversation_keeps_its_own(monkeypatch):
    tiny, loaded, read = str(GOLDEN / "libra-7b" / "model"), [], app.load
    monkeypatch.setattr(app, "load", lambda *arguments: loaded.append(arguments[1]) or read(*arguments))
    with Site("--model", str(PHANTOM), "--model", tiny) as site:
        assert json.loads(site.request("GET", "/about")[2])["models"] == [str(PHANTOM), tiny]
        names, few = [site.upload(image) for image in PAIR], {"max_new_tokens": 5}
        first = site.answer(images=names, options=few)
        events = site.ask(images=names, options=few, model=tiny)
        assert [event["loading"] for event in events if "loading" in event][-1] == 100
        again = site.answer(conversation=first["conversation"], question="And now?", options=few)
        assert again["prompt"].startswith(first["prompt"])
    assert loaded == [str(PHANTOM), tiny, str(PHANTOM)]


def test_a_model_in_8_bits_answers_as_generate_does():
    with Site("--dtype", "int8") as site:
        answer = site.answer(images=[site.upload(image) for image in PAIR])
    libra = Libra.from_pretrained(PHANTOM, device="cpu", dtype="int8")
    assert answer["outputs"][0]["text"] == generate(libra, Study(*PAIR), max_new_tokens=200)[0].text


# ------------------------------------------------------------------------------------------ queue


def until(stream, key: str):
    """The value of the first event with this key."""
    for line in stream:
        if key in (event := json.loads(line)):
            return event[key]
    raise AssertionError(f"the stream ended without {key}")


def test_who_waits_knows_the_place_and_stop_stops_both_who_waits_and_who_reads(gate):
    with Site() as site:
        names = [site.upload(image) for image in PAIR]
        streams, jobs = [], []
        for key, value in [("text", FIRST_WORD), ("ahead", 1), ("ahead", 2)]:
            streams.append(site.open_stream(images=names))
            jobs.append(until(streams[-1], "job"))
            assert until(streams[-1], key) == value
        # the second gives up, and the third moves up
        site.request("POST", f"/stop/{jobs[1]}", {})
        assert until(streams[1], "stopped")
        assert until(streams[2], "ahead") == 1
        # the first has text, which is its answer
        site.request("POST", f"/stop/{jobs[0]}", {})
        gate.is_open.set()
        last = [json.loads(line) for line in streams[0]][-1]
        assert last["was_stopped"] and len(json.loads(last["answer"])["outputs"][0]["token_ids"]) < 10
        assert "increased" in json.loads(until(streams[2], "answer"))["outputs"][0]["text"]


def test_a_closed_tab_frees_the_work(gate):
    with Site() as site:
        names = [site.upload(image) for image in PAIR]
        reading = site.open_stream(images=names)
        until(reading, "text")
        waiting = site.open_stream(images=names)
        assert until(waiting, "ahead") == 1
        later = site.open_stream(images=names)
        assert until(later, "ahead") == 2
        waiting.close()
        assert until(later, "ahead") == 1
        reading.close()
        gate.is_open.set()
        assert until(later, "answer")


def test_a_prefill_can_be_stopped(phantom):
    asked = []
    chat = Chat(phantom, Study(*PAIR))
    with pytest.raises(sample.Stopped):
        chat.answer(FINDINGS_PROMPT, sample.Options(), should_stop=lambda: asked.append(1) or len(asked) > 20)
    assert len(asked) == 21 and not chat.turns
    expected = generate(phantom, Study(*PAIR), max_new_tokens=5)
    assert [chat.ask(FINDINGS_PROMPT, max_new_tokens=5)] == expected


def test_a_full_queue_says_so(site, names, monkeypatch):
    monkeypatch.setattr(page.work, "WAITING", 0)
    assert "are waiting" in site.ask(images=names)[-1]["error"]


def test_a_shelf_is_bounded_in_number_size_and_time():
    shelf = Shelf(count=2, size=100, seconds=3600)
    first, second = shelf.put("a", 1), shelf.put("b", 1)
    assert shelf.get(first) == "a"
    third = shelf.put("c", 1)
    assert [shelf.get(name) for name in (first, second, third)] == ["a", None, "c"]
    large = shelf.put("d", 1000)
    assert [shelf.get(name) for name in (first, third, large)] == [None, None, "d"]
    shelf.seconds = -1
    assert shelf.get(large) is None


def test_a_warning_is_told_to_who_caused_it(capsys):
    told = []
    with page.work.notes_to(told.append):
        page.work.show_warning("three frames")
    page.work.show_warning("of nobody")
    assert told == ["three frames"] and "of nobody" in one_line(capsys)


# ------------------------------------------------------------------------------------------ images


def test_a_picture_is_what_the_model_sees(site):
    for data in (dicom_of(PAIR[0]), PAIR[0].read_bytes()):
        status, headers, body = site.request("GET", f"/images/{site.upload(data)}")
        shown = Image.open(io.BytesIO(body))
        assert (status, headers["content-type"], shown.mode) == (200, "image/png", "L")
        assert np.array_equal(shown.convert("RGB"), sample.load_image(data))


def test_a_dicom_pair_is_answered_as_by_sample(site, phantom):
    pair = list(map(dicom_of, PAIR))
    answer = site.answer(images=list(map(site.upload, pair)))
    assert answer["outputs"][0]["text"] == generate(phantom, Study(*pair), max_new_tokens=200)[0].text


opened: list | None = None  # files opened for writing, while it is a list


def watch(event, arguments):
    if opened is not None and event == "open" and arguments[2] & 3:
        opened.append(arguments[0])


def test_an_upload_is_never_written(site):
    global opened
    noise = np.random.default_rng(0).integers(0, 255, (1500, 1500), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    sys.addaudithook(watch)
    opened = []
    try:
        site.upload(file.getvalue())
        assert opened == []
    finally:
        opened = None


# ------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("changes", "culprit"),
    [
        ({"images": []}, "one or two images"),
        ({"images": ["nothing"]}, "no longer in memory"),
        ({"images": "../../etc/passwd"}, "images is"),
        ({"model": "/etc"}, "no model /etc"),
        ({"question": ""}, "question is ''"),
        ({"circumstance": "tomorrow"}, "circumstance"),
        ({"context": {"diagnosis": "?"}}, "no diagnosis"),
        ({"context": {"history": 3}}, "history is 3"),
        ({"options": {"num_beams": 1000}}, "num_beams is 1000"),
        ({"options": {"num_beams": 2, "temperature": 1}}, "exclude each other"),
        ({"options": {"beams": 2}}, "no beams"),
        ({"options": []}, "options is []"),
        ({"conversation": "nothing"}, "conversation is no longer in memory"),
        ({"color": "red"}, "no color"),
    ],
)
def test_a_wrong_question_is_a_sentence(site, names, changes, culprit):
    status, text = sentence(site, "POST", "/ask", {"model": site.model, "images": names} | changes)
    assert status in (400, 410) and culprit in text and "\n" not in text


def test_a_counterfactual_needs_a_prior(site, names):
    question = {"model": site.model, "images": names[:1], "circumstance": "without the prior"}
    assert "needs a prior" in sentence(site, "POST", "/ask", question)[1]


def test_a_question_that_fails_later_is_a_sentence_in_the_stream(site, names):
    error = site.ask(images=names, question="effusion " * 440)[-1]["error"]
    assert "shorten the query" in error


@pytest.mark.parametrize(
    "body", [b"", b"no image", PAIR[0].read_bytes()[:2000], b"\0" * 128 + b"DICM", b"<svg/>", b"%!PS-Adobe"]
)
def test_a_broken_file_is_a_sentence(site, body):
    status, text = sentence(site, "POST", "/images", body)
    assert status == 400 and text.startswith("the image is ") and "\n" not in text


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"[" * 10_000, b"\xff"])
def test_what_is_no_json_object_is_a_sentence(site, body):
    assert sentence(site, "POST", "/ask", body) == (400, "the request is not a JSON object")


@pytest.mark.parametrize("address", ["/etc/passwd", "file:///etc/passwd", "ftp://example.org/x", "", None, 3])
def test_an_address_is_never_a_path(site, address):
    assert sentence(site, "POST", "/images", {"address": address})[1] == "an address begins with http:// or https://"


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "[::1]", "10.0.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0"]
)
def test_an_address_of_a_private_network_is_refused(site, host):
    port = "" if host.startswith("1") else f":{site.port}"
    assert "not on the public internet" in sentence(site, "POST", "/images", {"address": f"http://{host}{port}/"})[1]


PATHS = ["/../", "/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/images/../../etc/passwd", "/images/..%2f..%2fx",
         "/examples/..%2f..%2fREADME.md", "/examples/%00", "/page/index.html", "//etc/passwd"]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_no_path_of_a_request_is_opened(site, path):
    status, _, body = site.request("GET", path)
    assert status in (404, 410) and b"root:" not in body


# ------------------------------------------------------------------------------------------ strangers


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "evil.example:7860", "", "localhost@evil"])
def test_a_wrong_host_is_refused(site, host):
    assert sentence(site, "GET", "/about", Host=host)[0] == 403


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:1", "[::1]:7860", "LOCALHOST:80"])
def test_the_names_of_this_machine_are_known(site, host):
    assert site.request("GET", "/about", Host=host)[0] == 200


def test_another_page_cannot_post(site):
    host = f"127.0.0.1:{site.port}"
    origins = ["http://evil.example", "null", "http://127.0.0.1:1"]
    statuses = [site.request("POST", "/stop/x", {}, Host=host, Origin=origin)[0] for origin in origins]
    assert statuses == [403] * 3
    assert site.request("POST", "/stop/x", {}, Sec_Fetch_Site="cross-site")[0] == 403
    assert site.request("POST", "/stop/x", {}, Host=host, Origin=f"http://{host}")[0] == 200


def test_a_token_is_asked_for_and_taken_from_address_cookie_and_header():
    with Site("--token", "a-secret-token") as site:
        assert site.service.address.endswith("/?token=a-secret-token")
        assert [site.request("GET", path)[0] for path in ("/", "/about", "/?token=wrong-token")] == [401] * 3
        status, headers, _ = site.request("GET", "/?token=a-secret-token")
        assert status == 303 and headers["location"] == "/" and "HttpOnly; SameSite=Strict" in headers["set-cookie"]
        cookie = headers["set-cookie"].split(";")[0]
        assert site.request("GET", "/about", Cookie=cookie)[0] == 200
        assert site.request("GET", "/about", Authorization="Bearer a-secret-token")[0] == 200
        assert site.request("GET", "/about", Authorization="Bearer a-secret-tokem")[0] == 401


def test_beyond_this_machine_it_warns_and_makes_a_token():
    with pytest.warns(UserWarning, match="open to other machines"):
        site = Site("--host", "0.0.0.0")
    with site:
        assert re.search(r"\?token=[\w-]{16,}$", site.service.address)
        assert site.request("GET", "/about", Host="192.168.1.7:7860")[0] == 401
        assert site.request("GET", "/about", Host="evil.example")[0] == 403


def test_the_page_runs_only_its_own_script_and_names_no_other_host(site):
    _, headers, body = site.request("GET", "/")
    text, policy = body.decode(), headers["content-security-policy"]
    (script,) = re.findall("<script>(.*?)</script>", text, re.S)
    assert f"script-src 'sha256-{b64encode(sha256(script.encode()).digest()).decode()}';" in policy
    assert "default-src 'none'" in policy and "unsafe" not in policy
    markup, _ = text.split("<script>")
    assert not re.search(r"""(src|href)="(?!data:)|url\((?!#)|@import|https?://\w""", markup)
    assert not re.search(r"https?://\w|innerHTML|eval\(", script)
    wanted = {"x-content-type-options": "nosniff", "referrer-policy": "no-referrer", "cache-control": "no-store"}
    assert wanted.items() <= headers.items()


# ------------------------------------------------------------------------------------------ large and slow


def raw(site, *parts: bytes) -> bytes:
    """What the server says to bytes on a connection, until it hangs up."""
    with socket.create_connection(("127.0.0.1", site.port), timeout=60) as connection:
        for part in parts:
            connection.sendall(part)
        answer = b""
        try:
            while piece := connection.recv(2**16):
                answer += piece
        except ConnectionResetError:
            pass
    return answer


HEAD = b"POST /images HTTP/1.1\r\nHost: localhost\r\n"


def test_65_megabytes_are_refused_before_they_are_read(site):
    answer = raw(site, HEAD + b"Content-Length: %d\r\n\r\n" % (65 * 2**20))
    assert answer.startswith(b"HTTP/1.1 413") and b"larger than 64 MB" in answer
    # in pieces, whose number nobody knows before
    piece = b"%x\r\n" % 2**20 + bytes(2**20) + b"\r\n"
    with socket.create_connection(("127.0.0.1", site.port), timeout=60) as connection:
        connection.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        with pytest.raises(OSError):
            for _ in range(100):
                connection.sendall(piece)
    assert site.request("GET", "/about")[0] == 200


def test_many_uploads_at_once_are_bounded(site, monkeypatch):
    monkeypatch.setattr(app, "INCOMING_BYTES", 1000)
    assert "many people" in sentence(site, "POST", "/images", bytes(2000))[1]


def test_a_slow_client_is_bounded_and_the_server_answers_others(site, monkeypatch):
    # with its header
    monkeypatch.setattr(page.safety, "REQUEST_SECONDS", 0.2)
    assert raw(site) == b""
    assert raw(site, b"GET /about HTTP/1.1\r\nHost: local") == b""
    monkeypatch.undo()
    # with what follows
    monkeypatch.setattr(app, "IMAGE_SECONDS", 0.2)
    monkeypatch.setattr(app, "ASK_SECONDS", 0.2)
    for path in (b"images", b"ask"):
        answer = raw(site, b"POST /%s HTTP/1.1\r\nHost: localhost\r\nContent-Length: 900\r\n\r\n" % path, b"x")
        assert answer.startswith(b"HTTP/1.1 408") and b"took too long" in answer
    # with a second request on the same connection, which is not waited for
    answer = raw(site, b"GET /about HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert b"connection: close" in answer
    assert site.request("GET", "/about")[0] == 200


def test_who_does_not_read_is_hung_up_on(site, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 255, (3000, 3000), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG", compress_level=0)
    name = site.upload(file.getvalue())
    monkeypatch.setattr(page.safety, "STALL_SECONDS", 0.2)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(60)
        connection.connect(("127.0.0.1", site.port))
        connection.sendall(b"GET /images/%s HTTP/1.1\r\nHost: localhost\r\n\r\n" % name.encode())
        deadline = time.monotonic() + 60
        while site.service.server.server_state.connections and time.monotonic() < deadline:
            time.sleep(0.05)
    assert not site.service.server.server_state.connections
    monkeypatch.undo()
    assert site.request("GET", "/about")[0] == 200


@pytest.mark.parametrize("data", [b"\x16\x03\x01\x02\0\x01\0\r\n\r\n", b"GET\r\n\r\n", b"A" * 100_000])
def test_what_is_no_http_is_refused(site, data):
    assert raw(site, data)[:12] in (b"HTTP/1.1 400", b"")  # or a reset, with what was not read
    assert site.request("GET", "/about")[0] == 200


# ------------------------------------------------------------------------------------------ command line


def test_the_program_prints_its_address_serves_and_ends_with_ctrl_c():
    command = [sys.executable, "app.py", "--model", "assets/phantom", "--port", "0", "--device", "cpu"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        site = Site.__new__(Site)
        site.port, site.model = int(re.search(r"^Open http://127\.0\.0\.1:(\d+)/ ", line)[1]), "assets/phantom"
        assert b"Not for clinical use" in site.request("GET", "/")[2]
        names = [site.upload(image) for image in PAIR]
        events = site.ask(images=names)
        assert any("would run past" in event.get("note", "") for event in events) and "answer" in events[-1]
    finally:
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err.strip()) == (130, "", "")


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        (["--model", "nowhere"], "nowhere"),
        (["--num-beams", "0"], "num_beams is 0"),
        (["--port", "99999"], "--port is 99999"),
        (["--token", "short"], "--token"),
        (["--host", "203.0.113.77"], "203.0.113.77"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(arguments, culprit, capsys, monkeypatch):
    monkeypatch.setattr("warnings.showwarning", lambda *_, **__: None)
    try:
        status = app.main(app.parse(["--model", str(PHANTOM), "--port", "0", *arguments]))
    except SystemExit as exit:
        status = exit.code
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert status == 2 and culprit in error


def test_a_port_in_use_is_a_mistake(site, capsys):
    assert app.main(app.parse(["--model", str(PHANTOM), "--port", str(site.port)])) == 2
    assert str(site.port) in one_line(capsys)
