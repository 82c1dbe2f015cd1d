"""The page in a real browser, Debian's Chromium. Oracle: what the phantom model says of its pair, and the eye."""

import json
import re
import shutil

import pytest
from conftest import FIRST_WORD, PAIR, Site, dicom_of

playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install -r requirements-test.txt")
pytest.importorskip("uvicorn", reason="no uvicorn: pip install -r requirements-app.txt")
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(not BROWSER, reason="no Chromium: apt-get install chromium")
expect = playwright.expect
expect.set_options(timeout=60_000)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip
DESK, PHONE = {"width": 1600, "height": 1000}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def site():
    with Site() as site:
        yield site


@pytest.fixture
def visit(browser):
    """visit(site, size) -> the page. At the end, nothing may have gone wrong in it or been asked of another host."""
    contexts, problems, asked = [], [], []

    def open_page(site, size=DESK, **options):
        context = browser.new_context(viewport=size, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text) if "Security Policy" in message.text else None)
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"http://127.0.0.1:{site.port}/")
        expect(page.locator("#examples button")).to_have_count(2)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not problems
    assert all(re.match(r"http://127\.0\.0\.1:|blob:http://127\.0\.0\.1:|data:,$", url) for url in asked)


def give(page, current=None, prior=None):
    """Chooses files, a path or what playwright takes in its place."""
    for number, file in enumerate((current, prior)):
        if file:
            page.locator("input[type=file]").nth(number).set_input_files(file)
            name = file["name"] if isinstance(file, dict) else file.name
            expect(page.locator("figcaption").nth(number)).to_contain_text(f"{name} · ")


def reports(page) -> list[str]:
    """The texts of the reports, when all are complete."""
    expect(page.locator("article[aria-busy]")).to_have_count(0)
    return page.locator("article > .text").all_text_contents()


def changes(text: str) -> list[str]:
    return re.findall("increased|decreased", text)


def as_upload(name: str, data: bytes) -> dict:
    return {"name": name, "mimeType": "application/octet-stream", "buffer": data}


# ------------------------------------------------------------------------------------------ the pair and the report


def test_a_png_pair_gives_a_report_whose_words_flip_when_the_images_are_exchanged(visit, site):
    page = visit(site)
    give(page, *PAIR)
    page.get_by_role("button", name="Write the report").click()
    (text,) = reports(page)
    assert changes(text) == ["increased", "increased"]
    mark = page.locator("mark.worse", has_text="increased").first
    assert "▲" in mark.evaluate("node => getComputedStyle(node, '::before').content")
    page.get_by_role("button", name="Exchange").click()
    page.get_by_role("button", name="Write the report").click()
    expect(page.locator("mark.better")).to_have_count(3)  # two words, and one of the legend
    (text,) = reports(page)
    assert changes(text) == ["decreased", "decreased"]


def test_a_dicom_pair_is_shown_and_read(visit, site):
    page = visit(site)
    give(page, *[as_upload(f"{path.stem}.dcm", dicom_of(path)) for path in PAIR])
    expect(page.locator("figcaption").first).to_contain_text("current.dcm · 320 × 320")
    assert page.locator(".film img").first.evaluate("image => image.decode().then(() => image.naturalWidth)") == 320
    page.keyboard.press("r")
    assert changes(reports(page)[0]) == ["increased", "increased"]


def test_one_click_shows_what_the_prior_did(visit, site):
    page = visit(site)
    page.get_by_role("button", name="Today and before").click()
    page.get_by_role("button", name="What did the prior do?").click()
    expect(page.locator("article .actions:visible")).to_have_count(3)
    assert list(map(changes, reports(page))) == [["increased"] * 2, [], ["decreased"] * 2]
    articles = page.locator("article")
    expect(articles.nth(0).locator("mark.gone", has_text="increased")).to_have_count(2)
    expect(articles.nth(2).locator("mark.come", has_text="decreased")).to_have_count(2)
    expect(page.locator("#reading")).to_be_visible()


def test_beams_have_scores_and_a_further_question_an_answer(visit, site):
    page = visit(site)
    page.get_by_role("button", name="The same, reversed").click()
    page.get_by_text("How to decode").click()
    page.get_by_role("spinbutton", name="Beams").fill("3")
    page.get_by_role("spinbutton", name="Reports").fill("3")
    page.get_by_role("button", name="Write the report").click()
    reports(page)
    scores = [float(text) for text in re.findall(r"score (-[\d.]+)", page.locator("article ol").inner_text())]
    assert len(scores) == 3 and scores == sorted(scores, reverse=True)
    page.get_by_label("A further question").fill("Is there an effusion?")
    page.get_by_role("button", name="Ask").click()
    expect(page.locator("article .text.small").last).to_contain_text(re.compile(r"\w\w"))
    reports(page)


def test_the_download_is_what_json_prints(visit, site):
    page = visit(site)
    give(page, PAIR[0])
    page.get_by_label("Indication").fill("dyspnea")
    page.get_by_label("Technique").fill("portable")
    page.get_by_role("button", name="Write the report").click()
    (text,) = reports(page)
    with page.expect_download() as download:
        page.get_by_role("button", name="JSON").click()
    printed = json.loads(download.value.path().read_text())
    assert printed.keys() == {"prompt", "input_ids", "outputs", "seconds"}
    assert printed["outputs"][0]["text"] == text
    assert "clinical context: Indication: dyspnea Technique: portable" in printed["prompt"]
    with page.expect_download() as download:
        page.get_by_role("button", name="Text").click()
    assert download.value.path().read_text() == text + "\n"


def test_images_come_by_dropping_and_pasting(visit, site):
    page = visit(site)
    event = """([kind, files]) => {
        const data = new DataTransfer();
        for (const [name, bytes] of files) data.items.add(new File([new Uint8Array(bytes)], name));
        const init = {bubbles: true, cancelable: true, dataTransfer: data, clipboardData: data};
        document.body.dispatchEvent(kind === "drop" ? new DragEvent(kind, init) : new ClipboardEvent(kind, init));
    }"""
    both = [[path.name, list(path.read_bytes())] for path in PAIR]
    page.evaluate(event, ["paste", both[:1]])
    expect(page.locator("figcaption").nth(0)).to_contain_text("current.png")
    page.evaluate(event, ["paste", both[1:]])
    expect(page.locator("figcaption").nth(1)).to_contain_text("prior.png")
    page.evaluate(event, ["drop", both[::-1]])
    expect(page.locator("figcaption").nth(0)).to_contain_text("prior.png")
    expect(page.locator("figcaption").nth(1)).to_contain_text("current.png")


def test_an_image_that_the_server_has_forgotten_is_sent_again(visit):
    with Site() as site:
        page = visit(site)
        page.get_by_role("button", name="Today and before").click()
        expect(page.get_by_role("button", name="What did the prior do?")).to_be_enabled()
        site.service.app.images.values.clear()
        page.get_by_role("button", name="Write the report").click()
        assert changes(reports(page)[0]) == ["increased", "increased"]


# ------------------------------------------------------------------------------------------ mistakes and stopping


def test_a_broken_file_and_a_private_address_are_sentences_and_a_name_stays_text(visit, site):
    page = visit(site)
    page.locator("input[type=file]").first.set_input_files(as_upload("<img src=x>.png", b"no image"))
    expect(page.locator("#status")).to_have_text("the image is not an image: give a JPEG, PNG, TIFF or DICOM")
    page.get_by_label("Address of the prior image").fill(f"http://127.0.0.1:{site.port}/examples/prior")
    page.get_by_role("button", name="Fetch").last.click()
    expect(page.locator("figcaption").nth(1)).to_contain_text("not on the public internet")
    give(page, as_upload("<img src=x>.png", PAIR[0].read_bytes()))
    expect(page.locator("figcaption").first).to_contain_text("<img src=x>.png")
    page.get_by_text("How to decode").click()
    page.get_by_label("Temperature").fill("-1")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Write the report").click()
    expect(page.locator("article .text")).to_contain_text("temperature is -1")


def test_the_report_streams_and_stop_keeps_what_there_is(visit, gate):
    with Site() as site:
        page = visit(site)
        page.get_by_role("button", name="Today and before").click()
        expect(page.get_by_role("button", name="What did the prior do?")).to_be_enabled()
        page.keyboard.press("c")
        expect(page.locator("article[aria-busy] .text").first).to_have_text(FIRST_WORD)
        expect(page.locator("article small").nth(1)).to_have_text("Waiting: 1 before you")
        page.keyboard.press("Escape")
        expect(page.locator("article small").nth(2)).to_have_text("Stopped")
        gate.is_open.set()
        expect(page.locator("article small").first).to_contain_text("stopped ·")
        text = reports(page)[0]
        assert text.startswith(FIRST_WORD) and len(text.split()) < 10


# ------------------------------------------------------------------------------------------ looks and keys


def test_everything_is_done_by_keyboard(visit, site):
    page = visit(site)
    # a listener for each key would sometimes come later than the key
    files = iter(PAIR)
    page.on("filechooser", lambda chooser: chooser.set_files(next(files)))
    page.keyboard.press("?")
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("write the report")
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    for key, path in zip("12", PAIR, strict=True):
        page.keyboard.press(key)
        expect(page.locator("figcaption").nth(int(key) - 1)).to_contain_text(path.name)
    # the first film has the focus after a few Tabs, and shows it
    film = page.locator(".film").first
    for _ in range(20):
        page.keyboard.press("Tab")
        if film.evaluate("node => node === document.activeElement"):
            break
    assert film.evaluate("node => getComputedStyle(node).outlineStyle") == "solid"
    place = lambda: page.locator(".film img").evaluate_all("images => images.map(image => image.style.transform)")
    for key in ("+", "+", "+", "ArrowRight", "Shift+ArrowLeft"):
        page.keyboard.press(key)
    one, other = place()
    assert one == other and "scale(1.95" in one
    expect(page.locator("#zooms")).to_contain_text("195 % · window 245 at 128")
    page.keyboard.press("0")
    expect(page.locator("#zooms")).to_contain_text("100 % · window 255 at 128")
    for key, visible in (("d", [False, False, True]), ("b", [True, False, False]), ("s", [True, True, False])):
        page.keyboard.press(key)
        assert [page.locator("figure").nth(i).is_visible() for i in range(3)] == visible
    page.keyboard.press("x")
    page.keyboard.press("r")
    assert changes(reports(page)[0]) == ["decreased", "decreased"]
    page.keyboard.press("f")
    page.keyboard.type("Is there an effusion? r")
    page.keyboard.press("Enter")
    expect(page.locator("article .text.small")).to_contain_text(re.compile(r"\w\w"))
    reports(page)


def test_the_difference_is_grey_where_nothing_has_changed(visit, site):
    page = visit(site)
    values = "canvas => [...new Set(canvas.getContext('2d').getImageData(0, 0, 1024, 1024).data)].length"
    for prior, check in ((PAIR[0], lambda number: number == 2), (PAIR[1], lambda number: number > 50)):
        give(page, PAIR[0], prior)
        page.keyboard.press("d")
        for _ in range(200):
            if check(page.locator("canvas").evaluate(values)):
                break
            page.wait_for_timeout(50)
        else:
            raise AssertionError("the difference has other greys")
        page.keyboard.press("s")


def test_dragging_moves_and_sets_the_window(visit, site):
    page = visit(site)
    give(page, *PAIR)
    expect(page.locator("#zooms")).to_contain_text("100 %")
    box = page.locator(".film").first.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.wheel(0, -400)
    expect(page.locator("#zooms")).to_contain_text("200 %")
    for button, change in (("left", "transform"), ("right", "filter")):
        image = page.locator(".film img").last
        before = image.evaluate(f"node => getComputedStyle(node).{change}")
        page.mouse.move(x, y)
        page.mouse.down(button=button)
        page.mouse.move(x - 80, y + 60)
        page.mouse.up(button=button)
        assert image.evaluate(f"node => getComputedStyle(node).{change}") != before


def test_who_wants_no_motion_blinks_by_hand(visit, site):
    page = visit(site, reduced_motion="reduce")
    give(page, *PAIR)
    page.keyboard.press("b")
    for shown in (0, 1, 0):
        assert [page.locator("figure").nth(i).is_visible() for i in range(2)] == [shown == 0, shown == 1]
        page.keyboard.press("b")


@pytest.mark.parametrize("size", [DESK, {"width": 1024, "height": 768}, {"width": 600, "height": 1400}, PHONE])
def test_the_films_are_large_and_nothing_covers_them(visit, site, size):
    page = visit(site, size)
    page.get_by_role("button", name="Today and before").click()
    expect(page.get_by_role("button", name="What did the prior do?")).to_be_enabled()
    page.keyboard.press("c")
    expect(page.locator("article .actions:visible")).to_have_count(3)
    assert page.evaluate("() => document.documentElement.scrollWidth") <= size["width"]
    expect(page.get_by_text("Not for clinical use")).to_be_in_viewport(ratio=1)
    films = page.locator(".film.full:visible")
    assert films.count() == 2
    for number in range(2):
        film = films.nth(number)
        film.scroll_into_view_if_needed()
        # what the eye meets at the corners, where the markers are, is the film
        covered = film.evaluate("""node => {
            const box = node.getBoundingClientRect();
            const places = [[.02, .02], [.98, .02], [.5, .5], [.02, .98], [.98, .98]];
            const meet = ([x, y]) => document.elementFromPoint(box.x + x * box.width, box.y + y * box.height);
            return places.map(meet).filter(other => other !== node).length;
        }""")
        assert covered == 0
        box = film.bounding_box()
        assert min(box["width"], box["height"]) > 0.3 * min(size.values())
        if size["width"] < 700:
            assert box["width"] > 0.94 * size["width"]
