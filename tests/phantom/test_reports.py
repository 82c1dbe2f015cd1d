"""Reports against the hidden state they describe, the published section rules and the published temporal keywords."""

import re

import numpy as np
import pytest
from conftest import read

from phantom.history import DEVICES, FINDINGS, history
from phantom.reports import read_report, report

KEYWORDS = set(read("text", "temporal_f1.json")["keywords"])
WORDS = {None: set(), "new": {"new"}, "worse": {"increased", "worsened"}, "improved": {"decreased", "improved"},
         "unchanged": {"unchanged"}, "resolved": {"resolved"}, "removed": {"removal"}}  # fmt: skip


def sections(text):
    """Name -> text by the published rules, for reports whose headers are plain ones."""
    names = read("text", "section_rules.json")["names"]
    parts = re.split(r"\n ([A-Z ()/,-]+):\s", text)
    return {names[name.lower()]: " ".join(body.split()) for name, body in zip(parts[1::2], parts[2::2], strict=True)}


def keywords(text):
    return KEYWORDS & set(re.findall("[a-z]+", text.lower()))


@pytest.fixture(scope="module")
def reports():
    """(state, sections of its report) of 300 patients."""
    states = [state for patient in range(300) for state in history(0, patient)]
    return [(state, sections(report(state))) for state in states]


def test_a_report_has_the_published_form_and_sections(reports):
    for state, parts in reports:
        assert all(line.startswith(" ") for line in report(state).splitlines())
        assert {"examination", "technique", "comparison", "findings", "impression"} < parts.keys()
        assert {"indication", "history"} & parts.keys()
        assert not (state.prior and "None" in parts["comparison"])
        assert ("LAT" in parts["examination"]) == ("LATERAL" in state.images)
    # the words about a comparison do not say whether there is a prior
    compared = ["None" not in parts["comparison"] for state, parts in reports if state.prior is None]
    assert 0.4 < np.mean(compared) < 0.6
    lengths = [len(parts["findings"].split()) for _, parts in reports]
    assert 30 < np.mean(lengths) < 45 and min(lengths) >= 15 and max(lengths) <= 80


def test_one_sentence_tells_each_finding_with_its_side_and_one_keyword_of_its_change(reports):
    for state, parts in reports:
        named, sentences = state.present | state.gone, parts["findings"].lower().split(".")
        for name in FINDINGS | DEVICES:
            about = [sentence for sentence in sentences if name in sentence and not re.search(r"\bno\b", sentence)]
            assert len(about) == (name in named), (name, sentences)
            if name in named:
                change, side = state.changes.get(name), named[name].side
                assert len(keywords(about[0])) == (change is not None)
                assert keywords(about[0]) <= WORDS[change]
                assert side is None or name == "edema" or side in about[0]


def test_the_words_of_size_are_in_order_of_severity(reports):
    severities = {0: [], 1: [], 2: []}
    for state, parts in reports:
        for name, said in read_report(parts["findings"]).items():
            if name in FINDINGS and name in state.present:
                severities[said["level"]].append(state.present[name].severity)
    small, moderate, large = severities.values()
    assert max(small) < min(moderate) and max(moderate) < min(large)


def test_the_changes_are_read_back_and_the_impression_adds_none(reports):
    for state, parts in reports:
        changes = {name: said["change"] for name, said in read_report(parts["findings"]).items()}
        assert changes == {name: state.changes.get(name) for name in state.present | state.gone}
        assert keywords(parts["impression"]) <= set().union(*(WORDS[change] for change in changes.values()))


def test_what_a_model_may_write_is_read():
    assert read_report("") == read_report("The heart is normal. No pleural effusion or pneumothorax.") == {}
    said = read_report(
        "A new small right pleural effusion is seen. No pneumothorax or edema, but there is moderate cardiomegaly; "
        "The left upper lobe\nconsolidation has resolved. 4.5 cm above the carina an endotracheal tube without nodule."
    )
    assert said == {
        "pleural effusion": {"change": "new", "side": "right", "level": 0},
        "cardiomegaly": {"change": None, "side": None, "level": 1},
        "consolidation": {"change": "resolved", "side": "left", "level": None},
        "endotracheal tube": {"change": None, "side": None, "level": None},
    }
