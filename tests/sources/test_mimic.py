"""Sections and priors against the published parser's values and a double loop."""

import random
import re
from collections import Counter

import pytest
from conftest import read

from sources import mimic
from sources.mimic import Frontal, priors, section_name, sections, split_report, study_sections

REPORT = """                                 FINAL REPORT
 EXAMINATION:  CHEST (PA AND LAT)

 INDICATION:  ___F with
 dyspnea

 FINDINGS:  {}

 IMPRESSION:  {}
""".replace("\n\n", "\n \n")


# ----------------------------------------------------------------------------------------------- sections


@pytest.mark.parametrize("number", range(58))
def test_reports_are_cut_as_the_published_parser_cuts_them(number):
    case = read("text", "sections.json")[number]
    names, starts, texts = zip(*split_report(case["report"]), strict=True)
    assert (list(names), list(starts), list(texts)) == (case["names"], case["starts"], case["sections"])
    found = sections(case["report"])
    assert {name: found.get(name) for name in case["columns"]} == case["columns"]


def test_headers_are_named_by_the_published_rules():
    rules = read("text", "section_rules.json")
    assert {header: section_name(header) for header in rules["names"]} == rules["names"]
    assert {header: section_name(f" {header.upper()} ") for header in rules["names"]} == rules["names"]
    for phrase in rules["findings_phrases"]:
        assert section_name(f"SOME {phrase.upper()} OF IT") == "findings"
    for place, word in enumerate(rules["contains"]):
        others = " ".join(rules["contains"][place:][::-1])
        assert section_name(f"PORTABLE {others}") == word  # the first in the list wins, and over the phrases
    assert section_name("A HEADER OF NO RULE") == "a header of no rule"


def test_the_studies_with_exceptions_are_the_published_ones():
    published = read("text", "mimic_exceptions.json")
    assert {f"s{study}": name for study, name in mimic.MISPLACED.items()} == published["section_names"]
    assert {f"s{study}": list(span) for study, span in mimic.SPANS.items()} == published["spans"]


def test_a_study_with_an_exception_has_findings_alone():
    report = REPORT.format("Clear.", "Normal.") + "x" * 900
    assert study_sections("50525523", report) == ({"findings": report[201:349].strip()}, "findings by span")
    assert study_sections("58235663", report)[0] == {}
    assert study_sections("57936451", report)[0] == {"findings": "___F with\n dyspnea"}
    assert study_sections("56451190", report)[0] == {}  # "note" is not there
    assert set(study_sections("50000001", report)[0]) > {"findings", "impression", "indication", "examination"}


PIECES = [
    *(
        "FINDINGS:",
        "IMPRESSION:",
        "IMPRESSON:",
        "HISTORY :",
        "COMPARISON:",
        "A NEW HEADER:",
        "CHEST, TWO VIEWS:",
        "EXAM:",
    ),
    *("\n ", "\n ", "\n ", "\n \n ", "\n", " ", "  ", "", "\r\n ", "\t"),
    *("The heart is normal.", "ET tube: satisfactory.", "___", "NO:", "é", "10:35", "(", "lower case header:", "A/B: "),
]


def test_no_text_is_lost_and_none_invented():
    draw = random.Random(0)
    kinds = Counter()
    for _ in range(3000):
        text = "".join(draw.choices(PIECES, k=draw.randrange(25)))
        parts, end = split_report(text), 0
        for part in parts:
            start = part.start + (3 if part.name == "last_paragraph" else 0)  # the blank line it was cut at
            assert text[start : start + len(part.text)] == part.text and start >= end
            gap = text[end:start]  # headers, and what was white between headers that were dropped
            assert gap == "\n \n" or re.fullmatch(r"(\s*[A-Z ()/,-]+:\s)*", gap), (text, gap)
            end = start + len(part.text)
            kinds[part.name] += 1
        assert re.fullmatch(r"(\s*[A-Z ()/,-]+:\s)*\s*", text[end:]), (text, text[end:])
        assert all(part.text.strip() for part in parts if part.name in ("findings", "impression"))
    assert all(kinds[name] > 50 for name in ("findings", "impression", "history", "full report", "last_paragraph"))


# ------------------------------------------------------------------------------------------------- priors


def random_images(draw, dates, times):
    names = draw.sample(range(100), draw.randrange(9))
    return [Frontal(draw.choice(dates), draw.choice(times), f"{name:02}") for name in names]


def brute_priors(images):
    """The prior of each image: the latest of all images of earlier dates."""
    found = {}
    for image in images:
        best = None
        for other in images:
            if image.date and other.date and other.date < image.date:
                late = lambda i: (i.date, i.time if i.time is not None else float("inf"), i.dicom)
                if best is None or late(other) > late(best):
                    best = other
        found[image] = best
    return found


def test_priors_are_those_of_a_double_loop():
    draw, with_prior = random.Random(1), 0
    for _ in range(3000):
        dates, times = ["21800101", "21800102", "21791231", "21800301", ""], [None, 5.5, 80000.0, 120000.0]
        images = random_images(draw, dates, times)
        assert dict(priors(images)) == brute_priors(images)
        assert [image for image, _ in priors(images)] == sorted(images, key=mimic.order)
        with_prior += sum(prior is not None for _, prior in priors(images))
    assert with_prior > 3000
