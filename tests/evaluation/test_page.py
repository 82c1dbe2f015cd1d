"""Oracles: Python's HTML parser, Pillow's scaling, and Chromium: texts stay texts, no request, search and marks."""

import base64
import html
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from conftest import GOLDEN
from PIL import Image

from evaluation import metrics
from evaluation import page as report
from evaluation.metrics import Interval
from evaluation.pairs import Pair

HOSTILE = [
    "</script><script>window.hacked = 1</script>", "<!--<script>", "<img src=x onerror=window.hacked=1>",
    "\"quotes\" & 'more' &lt;b&gt;", "<!--DATA--> \u2028\u2029 \\u003c </SCRIPT >", "{{}} ${window.hacked=1}",
]  # fmt: skip
IMAGES = ("0.png", "1.png", "2.png", "missing.png")
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def write(path, pairs, meteor=0, rouge=0, folder=GOLDEN / "images"):
    """A page; meteor, rouge: each study's values, or one for all."""
    report.write(
        path,
        title="a <b> title",
        subtitle="answers & questions <i>",
        groups={"all": len(pairs), "with prior": 1},
        scores={"ROUGE-L": {"all": Interval(50, 40, 60), "with prior": Interval(1)}},
        notes={"ROUGE-L": "<u>variant</u>"},
        pairs=pairs,
        table={"METEOR": np.resize(meteor, (len(pairs), 1)), "ROUGE-L": np.resize(rouge, (len(pairs), 1))},
        folder=folder,
    )
    return path


def pair(i, reference="a", prediction="b", images=()):
    return Pair(f"s{i}", reference, prediction, "Findings?", images)


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.inside = [], {}, None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.inside = dict(attributes).get("id", tag)

    def handle_data(self, data):
        self.text[self.inside] = self.text.get(self.inside, "") + data


def test_whatever_a_report_says_stays_text(tmp_path):
    pairs = [Pair(f"0{text}", f"1{text}", f"2{text}", f"3{text}") for text in HOSTILE]
    page = Page(write(tmp_path / "p.html", pairs).read_text())
    plain = Page(write(tmp_path / "q.html", [pair(9)]).read_text())
    assert page.tags == plain.tags  # not one tag more
    data = json.loads(page.text["data"])
    for field in ("id", "prompt", "reference", "prediction"):
        assert [study[field] for study in data["studies"]] == [getattr(pair, field) for pair in pairs]
    assert page.text["title"].strip() == page.text["h1"].strip() == "a <b> title"


def test_the_page_asks_no_network(tmp_path):
    text = write(tmp_path / "p.html", [pair(0, images=IMAGES[:2])]).read_text()
    assert "default-src 'none'" in text
    assert not re.search(r"<[^>]+ (src|href)=|url\(|@import|fetch\(|XMLHttpRequest", text)


def test_thumbnails_are_small_grey_and_shared(tmp_path):
    grey = np.tile(np.linspace(0, 255, 1200, dtype=np.uint8), (900, 1))
    Image.fromarray(grey).save(tmp_path / "large.jpg", quality=95)
    (tmp_path / "bad.jpg").write_bytes((tmp_path / "large.jpg").read_bytes()[:200])
    pairs = [pair(0, images=("large.jpg", "bad.jpg")), pair(1, images=("large.jpg",))]
    with pytest.warns(UserWarning, match=r"1 of 2 images .*bad.jpg"):
        page = Page(write(tmp_path / "p.html", pairs, folder=tmp_path).read_text())
    data = json.loads(page.text["data"])
    assert [study["images"] for study in data["studies"]] == [[0, None], [0]]
    image = Image.open(io.BytesIO(base64.b64decode(data["images"][0].split(",")[1])))
    assert image.mode == "L" and image.size == (report.SIDE, report.SIDE * 3 // 4)
    small = np.asarray(Image.fromarray(grey).resize(image.size, Image.Resampling.LANCZOS), dtype=float)
    assert np.abs(np.asarray(image, dtype=float) - small).mean() < 2
    assert len(data["images"][0]) < 10_000


def test_an_image_outside_of_the_folder_is_not_on_the_page(tmp_path):
    folder, secret = tmp_path / "images", tmp_path / "secret.png"
    folder.mkdir()
    Image.new("L", (9, 9), 77).save(secret)
    (folder / "link.png").symlink_to(secret)
    names = ("../secret.png", str(secret), "link.png")
    pairs = [pair(number, images=(name,)) for number, name in enumerate(names)]
    with pytest.warns(UserWarning, match=r"3 of 3 images .*leads out of the image folder"):
        page = Page(write(tmp_path / "p.html", pairs, folder=folder).read_text())
    assert json.loads(page.text["data"])["images"] == []


CHECKS = """<script>
const result = {}, text = node => node.textContent;
const all = (selector, node) => [...(node || document).querySelectorAll(selector)];
const set = (id, value, event) => { $(id).value = value; $(id).dispatchEvent(new Event(event)); };
const ids = () => all("#list article").map(card => data.studies[card.dataset.i].id);
const run = () => {
  if (!all("article *").length) return setTimeout(run, 50);
  try { CODE } catch (error) { result.error = String(error); }
  document.title = JSON.stringify(result);
};
setTimeout(run, 100);
</script>"""


def browse(page, code: str) -> dict:
    """What `code` puts into `result`, run when the first cards are drawn."""
    if not BROWSER:
        pytest.skip("no Chromium: apt-get install chromium")
    probe = page.with_name("probe.html")
    probe.write_text(page.read_text().replace("</body>", f"{CHECKS.replace('CODE', code)}</body>"))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1280,1000",
               "--virtual-time-budget=20000", "--run-all-compositor-stages-before-draw",
               f"--user-data-dir={page.parent / 'browser'}", "--dump-dom", probe.as_uri()]  # fmt: skip
    for _ in range(3):  # virtual time can run out before the first frame if the machine is busy
        printed = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
        title = html.unescape(re.search(r"<title>(.*?)</title>", printed, re.S)[1])
        if title.startswith("{"):
            break
    result = json.loads(title)
    assert "error" not in result, result
    return result


def test_hostile_reports_are_shown_as_they_are(tmp_path):
    pairs = [Pair(text, text, text[::-1], prompt=text) for text in HOSTILE]
    found = browse(write(tmp_path / "p.html", pairs), """
        result.hacked = window.hacked || 0;
        result.texts = all("article").map(card => all(".text", card).map(text));
        result.prompts = all(".prompt").map(text);
        result.images = all("article img").length;
        result.note = text(document.querySelector("tbody small"));
    """)  # fmt: skip
    assert found["hacked"] == found["images"] == 0
    assert found["texts"] == [[text, text[::-1]] for text in HOSTILE]
    assert found["prompts"] == HOSTILE and found["note"] == "<u>variant</u>"


def test_search_sort_and_filter(tmp_path):
    pairs = [
        pair(0, "Stable edema.", "Clear.", IMAGES[:2]),
        pair(1, "Effusion.", "EDEMA is new", IMAGES[:1]),
        pair(2, "Nodule.", "Nodule."),
    ]
    found = browse(write(tmp_path / "p.html", pairs, meteor=[10, 30, 20], rouge=[30, 20, 100]), """
        result.first = ids();
        set("metric", 0, "change"); result.meteor = ids();
        result.now = all(".head .now").map(text);
        $("order").click(); result.reversed = ids();
        set("search", "edema", "input"); result.search = ids(); result.count = text($("count"));
        set("search", "edema new", "input"); result.words = ids();
        set("search", "", "input"); set("group", "with prior", "change"); result.prior = ids();
        set("group", "all", "change"); all("#histograms button")[1].click(); result.histogram = ids();
        result.bars = all("#histograms svg")[1].querySelectorAll("title").length;
        result.images = all("article").map(card => all("img", card).filter(image => image.naturalWidth > 0).length);
        result.row = text(document.querySelector("tbody tr"));
    """)  # fmt: skip
    assert found["first"] == ["s1", "s0", "s2"]  # ROUGE-L, worst first
    assert found["meteor"] == ["s0", "s2", "s1"]
    assert sorted(found["now"]) == ["METEOR 10.0", "METEOR 20.0", "METEOR 30.0"]
    assert found["reversed"] == ["s1", "s2", "s0"]
    assert found["search"] == ["s1", "s0"] and found["count"] == "2 of 3 studies"
    assert (found["words"], found["prior"], found["histogram"]) == (["s1"], ["s0"], ["s2", "s0", "s1"])
    assert found["bars"] == 20 and found["images"] == [0, 2, 1]
    assert "50.00" in found["row"] and "[40.00, 60.00]" in found["row"] and "1.00" in found["row"]


def test_differing_words_and_words_of_change_are_marked(tmp_path):
    texts = [
        ("The edema is stable. No effusion.", "Edema has worsened; no effusion!"),
        ("a b c d", "b d a c"),
        ("", "new"),
        ("new_nodule Stably", "newer nodule"),
    ]
    pairs = [pair(i, *both) for i, both in enumerate(texts)]
    found = browse(write(tmp_path / "p.html", pairs, rouge=range(4)), """
        const marks = (card, name) => all(".text " + name, card).map(text);
        result.missed = all("article").map(card => marks(card, ".missed"));
        result.added = all("article").map(card => marks(card, ".added"));
        result.change = all("article").map(card => marks(card, ".change"));
    """)  # fmt: skip
    assert found["missed"][0] == ["The", "is ", "stable"] and found["added"][0] == ["has ", "worsened"]
    assert found["change"] == [["stable", "worsened"], [], ["new"], ["new", "Stably"]]
    for (reference, prediction), missed in zip(texts, found["missed"], strict=True):
        # the words that are not marked are ROUGE-L's common subsequence
        common = len(metrics.words(reference)) - len(metrics.words(" ".join(missed)))
        both = len(metrics.words(reference)) + len(metrics.words(prediction))
        assert 2 * common / max(1, both) == pytest.approx(metrics.rouge_l(prediction, reference))


def test_only_the_cards_near_the_window_are_filled(tmp_path):
    pairs = [pair(i, "Stable edema. " * 9, images=IMAGES[:2]) for i in range(1000)]
    count = 'result.filled = all("article").filter(card => card.hasChildNodes()).length;'
    assert 3 <= browse(write(tmp_path / "p.html", pairs), count)["filled"] <= 60
