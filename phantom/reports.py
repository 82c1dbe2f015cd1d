"""What the drawn hospital writes about a study, reports and questions, and `read_report`, which reads a report."""

import itertools
import re
import textwrap

from phantom.history import DEVICES, FINDINGS, SEVERITY_STEP, VOCABULARY, State, changes_between
from phantom.radiograph import Finding

SIDED = [name for name in FINDINGS if "{side}" in FINDINGS[name]["noun"]]  # findings whose side is told
LUNGS = ("consolidation", "atelectasis", "edema", "nodule")
PLEURA = ("pleural effusion", "pneumothorax")
UNCOUNTABLE = ("atelectasis", "edema", "cardiomegaly")  # they have a degree and no article, the others have a size
LEVEL_LIMITS = (0.43, 0.72)  # from here moderate, from here large: too coarse to tell a change


def report(state: State) -> str:
    """The report in the form of MIMIC-CXR: lines begin with a space, and "___" replaces what identifies the patient."""
    rng = state.generator("report")

    def pick(options):
        return options[rng.integers(len(options))]

    # 1) why the patient came
    sex = state.anatomy.sex
    patient = pick([f"___ year old {sex}", f"___-year-old {sex}", "___F" if sex == "woman" else "___M"])
    reason = f"{patient} with {pick(VOCABULARY['symptoms'])}{pick(VOCABULARY['aims'])}"
    layout = pick(["INDICATION"] * 4 + ["HISTORY", "both"])
    sections = {"HISTORY" if layout == "HISTORY" else "INDICATION": reason}
    if layout == "both":
        sections["HISTORY"] = pick(VOCABULARY["past"])
    # 2) how the images were taken, and what they are compared with
    examination, technique = VOCABULARY["examinations"][" ".join(state.images)]
    # a first study may be compared with a film from elsewhere, so that words alone do not say whether there is a prior
    compared = state.prior or state.generator("comparison").random() < 0.5
    comparison = pick(VOCABULARY["comparison" if compared else "no comparison"])
    sections = {"EXAMINATION": examination, **sections, "TECHNIQUE": technique, "COMPARISON": comparison}
    # 3) what they show
    text = f"{' ' * 33}FINAL REPORT\n"
    for name, body in sections.items():
        text += _wrap(f"{name}:  {body}") + " \n"
    text += " FINDINGS:  \n \n" + _wrap(" ".join(_findings(state, pick))) + " \n"
    return text + " IMPRESSION:  \n \n" + "".join(map(_wrap, _impression(state, pick)))


def _wrap(line: str) -> str:
    lines = textwrap.wrap(line, 78, break_long_words=False, break_on_hyphens=False)
    return "".join(f" {part}\n" for part in lines)


def _findings(state: State, pick) -> list[str]:
    """Sentences about devices, lungs, pleura and heart. What is absent is denied, unless it has just gone."""
    named, sentences = state.present | state.gone, []

    def tell(*names):
        for name in names:
            if name in named:
                templates = VOCABULARY["sentences"][state.changes.get(name, "present")]
                sentences.append(_fill(pick(templates), name, named[name]))

    def add(kind, name=""):
        sentences.append(pick(VOCABULARY[kind]).format(name))

    # devices and lungs
    tell(*DEVICES, *LUNGS)
    if not named.keys() & set(LUNGS):
        add("clear lungs")
    elif "consolidation" not in named:
        add("no consolidation")
    # pleura: one sentence denies all that is absent
    tell(*PLEURA)
    absent = " or ".join(name for name in PLEURA if name not in named)
    if absent:
        add("absent", absent)
    # heart, mediastinum and bones
    tell("cardiomegaly")
    if "cardiomegaly" not in named:
        add("normal heart")
    add("mediastinum")
    add("bones")
    return sentences


def _impression(state: State, pick) -> list[str]:
    """A line for each finding, numbered if there are several."""
    named, lines = state.present | state.gone, []
    for name in FINDINGS:
        if name in named:
            template = VOCABULARY["impressions"][state.changes.get(name, "present")]
            lines.append(_fill(template, name, named[name]))
    if len(lines) > 1:
        return [f"{number}. {line}" for number, line in enumerate(lines, 1)]
    return lines or [pick(VOCABULARY["no finding"])]


def _fill(template: str, name: str, finding: Finding) -> str:
    """A template with the words for one finding; it begins with a capital."""
    noun = bare = (FINDINGS | DEVICES)[name]["noun"].format(side=finding.side, place=finding.place)
    if name in FINDINGS:
        noun = f"{level_word(name, finding)} {bare}"
    words = {"noun": noun, "bare": bare, "be": "is", "have": "has", "a": "", "a_new": "new "}
    # articles: "a small effusion" and "a new small effusion", but "mild edema" and "small effusions"
    if name == "pleural effusion" and finding.side == "bilateral":
        words |= {"noun": f"{noun}s", "bare": f"{bare}s", "be": "are", "have": "have"}
    elif name not in UNCOUNTABLE:
        words |= {"a": "an " if noun[0] in "aeiou" else "a ", "a_new": "a new "}
    # what fills the lung gets worse, everything else grows
    more, less = ("worsened", "improved") if name in ("edema", "consolidation") else ("increased", "decreased")
    text = template.format(**words, more=more, less=less)
    return text[0].upper() + text[1:]


def level(severity: float) -> int:
    """0: small or mild, 1: moderate, 2: large or severe."""
    return sum(severity >= limit for limit in LEVEL_LIMITS)


def level_word(name: str, finding: Finding) -> str:
    words = VOCABULARY["degrees" if name in UNCOUNTABLE else "sizes"]
    return words[level(finding.severity)]


def read_report(text: str) -> dict[str, dict]:
    """Reads the findings of a report -> {finding or device: {"change", "side", "level"}}, None where it says nothing.

    This reads what a model writes that was trained on these reports. A clause ends at a full stop, a semicolon or
    "but". In it, "no" and "without" deny what follows; a side or a level belongs to the next name, and a word of
    change to all names.
    """
    names, changes = [*FINDINGS, *DEVICES], VOCABULARY["changes"]
    levels = {"small": 0, "mild": 0, "moderate": 1, "large": 2, "severe": 2}
    result = {}
    # a full stop before a digit is a decimal point
    text = " ".join(text.lower().split())
    for clause in re.split(r"[.;](?!\d)|\bbut\b", text):
        words = re.findall(rf"{'|'.join(names)}|[a-z]+", clause)
        change = next((changes[word] for word in words if word in changes), None)
        # a side and a level wait for the name that they belong to
        side = level = None
        for word in words:
            if word in ("no", "without"):
                break
            if word in names:
                result[word] = {"change": change, "side": side, "level": level}
                side = level = None
            elif word in ("right", "left", "bilateral"):
                side = word
            elif word in levels:
                level = levels[word]
    return result


def pair_questions(state: State) -> list[tuple[str, str, str]]:
    """(type, question, answer) about a study and its prior, as in Diff-VQA; none without a prior."""
    if state.prior is None:
        return []
    rows = []

    def ask(kind, answer, name=""):
        rows.append((kind, VOCABULARY["pair questions"][kind].format(name), answer))

    # 1) questions about the whole image
    findings = {name: finding for name, finding in state.present.items() if name in FINDINGS}
    ask("difference", difference(state.changes))
    ask("abnormality", ", ".join(findings) or "no abnormality")
    ask("view", f"{state.view} view")
    # 2) is it there: a random finding, and the first that is present
    random = state.generator("pair questions").integers(len(FINDINGS))
    chosen = {[*FINDINGS][random], *[*findings][:1]}
    for name in FINDINGS:
        if name in chosen:
            ask("presence", "yes" if name in findings else "no", name)
    # 3) details of all that are present
    for name, finding in findings.items():
        ask("level", level_word(name, finding), name)
        if finding.side:
            ask("location", f"{finding.side} {finding.place}", name)
    # edema first thickens the septa between the lobules, then fills the alveoli
    if "edema" in findings:
        ask("type", "interstitial" if findings["edema"].severity < 0.5 else "alveolar")
    return rows


def difference(changes: dict[str, str]) -> str:
    """The answer that names all changes."""
    templates = VOCABULARY["differences"]
    told = [templates[change].format(name) for name, change in changes.items() if change in templates]
    return ", ".join(told) or "nothing has changed"


def differences(states: list[State]) -> list[tuple[State, State, str]]:
    """(study, reference, answer): what has changed between each two studies of a patient, in both orders.

    A model can learn from all of them; radiologists only meet consecutive ones. Pairs are left out in which a severity
    has changed by less than it does from a study to the next.
    """
    rows = []
    for study, reference in itertools.permutations(states, 2):
        both = FINDINGS.keys() & study.present.keys() & reference.present.keys()
        steps = [abs(study.present[name].severity - reference.present[name].severity) for name in both]
        if not any(0 < round(step, 2) < SEVERITY_STEP[0] for step in steps):
            rows.append((study, reference, difference(changes_between(reference.present, study.present))))
    return rows


def image_questions(state: State) -> list[dict]:
    """Questions about one image and lists of answers, as in CXR-VQA."""
    rows = []

    def ask(content_type, answer, name=""):
        entry = VOCABULARY["image questions"][content_type]
        row = {"question": entry["question"].format(name), "semantic_type": entry["semantic_type"]}
        rows.append(row | {"content_type": content_type, "answer": answer})

    names, present = [*FINDINGS, *DEVICES], state.present
    name = names[state.generator("image questions").integers(len(names))]
    findings = [name for name in present if name in FINDINGS]
    ask("presence", ["yes" if name in present else "no"], name)
    ask("abnormality", findings)
    ask("attribute", [name for name in present if name in DEVICES])
    ask("plane", [state.view])
    ask("gender", ["female" if state.anatomy.sex == "woman" else "male"])
    ask("size", ["yes" if "cardiomegaly" in present else "no"])
    for name in findings:
        side = present[name].side
        if side:
            sides = ("right", "left") if side == "bilateral" else (side,)
            ask("anatomy", [f"{side} lung" for side in sides], name)
    return rows
