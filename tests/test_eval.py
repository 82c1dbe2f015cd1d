"""Scores against golden values, sacrebleu, rouge_score, nltk and brute force; what a wrong file is told."""

import csv
import importlib.util
import json
import random
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, read, seconds_of_children

import eval as evaluation
from evaluation import metrics
from evaluation import truth as truth_scores
from phantom import hospital as phantom

LEXICAL, TEMPORAL = read("text", "lexical.json"), read("text", "temporal_f1.json")
GOLDEN_NAMES = {"METEOR": "meteor", "ROUGE-L": "rougeL", "Temporal_entity_score": "temporal_f1"}
GOLDEN_NAMES |= {f"BLEU{n}": f"bleu{n}" for n in (1, 2, 3, 4)}


@pytest.fixture(scope="session")
def nltk_data(request):
    """NLTK, told where METEOR's data is: where it looks anyway, or put together from Debian's and a wheel's files."""
    nltk = pytest.importorskip("nltk")
    folder = Path(request.config.cache.mkdir("nltk_data"))
    nltk.data.path.append(str(folder))
    for name, build in {"corpora/wordnet": build_wordnet, "tokenizers/punkt_tab/english": build_punkt}.items():
        try:
            nltk.data.find(name)
        except LookupError:
            try:
                nltk.data.find(f"{name}.zip")
            except LookupError:
                build(folder / name)
    return nltk


def build_wordnet(target: Path):
    source = Path("/usr/share/wordnet")  # WordNet 3.0
    if not (source / "data.noun").exists():
        pytest.skip("METEOR's WordNet is missing: apt-get install wordnet-base")
    shutil.copytree(source, target, ignore=lambda folder, names: [n for n in names if Path(folder, n).is_dir()])
    (target / "lexnames").write_text("".join(f"{i:02}\tunnamed\t1\n" for i in range(45)))
    (target / "index.sense").touch()


def build_punkt(target: Path):
    inside = "llama_index/core/_static/nltk_cache/tokenizers/punkt_tab/english"
    if importlib.util.find_spec("llama_index"):
        shutil.copytree(Path(importlib.util.find_spec("llama_index.core").origin).parents[2] / inside, target)
        return
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", target.parents[2],
               "llama-index-core==0.14.25"]  # fmt: skip
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("METEOR's punkt_tab is missing: pip download --no-deps llama-index-core==0.14.25 has it")
    wheel = next(target.parents[2].glob("llama_index_core-*.whl"))
    target.mkdir(parents=True)
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith(inside) and not name.endswith("/"):
                (target / Path(name).name).write_bytes(archive.read(name))
    wheel.unlink()


@pytest.fixture
def no_meteor(monkeypatch):
    """For tests of other matters: METEOR's data need not be there."""
    monkeypatch.setattr(metrics, "meteor_scorer", lambda: lambda prediction, reference: 0.5)


def random_pairs(count: int) -> list[tuple[str, str]]:
    """Report pairs shuffled together from the golden ones' sentences, and hand-made edges."""
    draw, sentences = random.Random(0), [s for text in LEXICAL["references"] for s in re.split(r"(?<=\.)\s", text) if s]
    pairs = []
    for _ in range(count):
        reference = draw.choices(sentences, k=draw.randint(1, 7))
        prediction = [s for s in reference if draw.random() < 0.7] + draw.choices(sentences, k=draw.randint(0, 3))
        lost = " ".join(word for word in " ".join(prediction).split() if draw.random() < 0.9)
        pairs.append((lost, " ".join(reference)))
    edges = ["", "a", "No change.", "1.5 cm, 3,000 mL; 2.", "..", "Größe: 38.5°C — Δ", "心影 正常", "x " * 300]
    return pairs + [(a, b) for a in edges for b in edges]


# ------------------------------------------------------------------------------------------ scores


def test_cleaning_is_the_published_one():
    assert list(map(metrics.clean, TEMPORAL["predictions"])) == TEMPORAL["clean"]
    for side in ("predictions", "references"):
        assert [metrics.clean(text.lower()) for text in LEXICAL[side]] == LEXICAL[f"clean_{side}"]


def test_temporal_f1_is_the_published_one():
    assert sorted(metrics.WORDS_OF_CHANGE) == TEMPORAL["keywords"]
    result = evaluation.temporal_f1_score(TEMPORAL["predictions"], TEMPORAL["references"])
    for side in ("prediction_entities", "reference_entities"):
        assert [sorted(entities) for entities in result[side]] == TEMPORAL[side]
    each = map(metrics.temporal_f1, result["prediction_entities"], result["reference_entities"])
    assert list(each) == pytest.approx(TEMPORAL["each"], abs=1e-15)
    assert result["f1"] == pytest.approx(TEMPORAL["f1"], abs=1e-12)
    several = TEMPORAL["multi"]
    united = evaluation.temporal_f1_score(several["predictions"], several["references"])
    assert united["f1"] == pytest.approx(several["f1"], abs=1e-12)
    first_two = evaluation.temporal_f1_score(TEMPORAL["predictions"][:2], TEMPORAL["references"][:2])
    assert first_two["f1"] == pytest.approx(0.500000000075, abs=1e-15)
    with pytest.raises(ValueError, match="1 predictions and 2 references"):
        evaluation.temporal_f1_score(["a"], ["a", "b"])


def test_lexical_scores_are_the_published_ones(nltk_data):
    table = metrics.statistics(LEXICAL["predictions"], LEXICAL["references"])
    assert set(table) == {*GOLDEN_NAMES, metrics.FLOOR}
    for key, name in GOLDEN_NAMES.items():
        each = metrics.score_of(table[key], 1) / 100
        whole = metrics.score_of(table[key].sum(0), len(each)) / 100
        assert whole == pytest.approx(LEXICAL[name], abs=1e-9), key
        known = [value is not None for value in LEXICAL["each"][name]]  # the published BLEU divides by zero elsewhere
        assert each[known] == pytest.approx([v for v in LEXICAL["each"][name] if v is not None], abs=1e-9), key


def test_meteor_is_nltk_s(nltk_data):
    from nltk import word_tokenize
    from nltk.translate.meteor_score import meteor_score

    meteor = metrics.meteor_scorer()
    for prediction, reference in random_pairs(30):
        direct = meteor_score([word_tokenize(reference)], word_tokenize(prediction))
        assert meteor(prediction, reference) == pytest.approx(direct, abs=1e-12)


def test_bleu_is_sacrebleu_s_without_smoothing(no_meteor):
    sacrebleu = pytest.importorskip("sacrebleu")
    pairs = random_pairs(300)
    # lists as sacrebleu takes them: it drops nothing, and neither do we
    for chosen in [pairs, *([pair] for pair in pairs if all(pair)), pairs[-20:]]:
        counts = np.array([metrics.bleu_counts(*pair) for pair in chosen]).sum(0)
        for n in (1, 2, 3, 4):
            ours = metrics.score_of(counts[[*range(n), *range(4, 4 + n), 8, 9]], len(chosen))
            bleu = sacrebleu.BLEU(tokenize="13a", smooth_method="none", max_ngram_order=n)
            theirs = bleu.corpus_score([p for p, _ in chosen], [[r for _, r in chosen]]).score
            assert ours == pytest.approx(theirs, abs=1e-9)


def test_tokens_are_mteval_13a_s():
    sacrebleu = pytest.importorskip("sacrebleu.tokenizers.tokenizer_13a")
    theirs, draw = sacrebleu.Tokenizer13a(), random.Random(0)
    for _ in range(5000):
        text = "".join(draw.choices(["a", "1", ".", ",", "-", " ", "\n", *"'_/:(é%~[", "&quot;", "<skipped>"], k=12))
        assert metrics.tokens_13a(text) == theirs(text).split()


def test_rouge_l_is_rouge_score_s():
    rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)
    for prediction, reference in random_pairs(300):
        theirs = scorer.score(reference, prediction)["rougeL"].fmeasure
        assert metrics.rouge_l(prediction, reference) == pytest.approx(theirs, abs=1e-12)


def test_bertscore_is_the_cosine_of_layer_5(tmp_path, monkeypatch):
    pytest.importorskip("bert_score")
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="needs the model distilbert-base-uncased"):
        metrics.bertscore(["a"], ["a"])
    folder = Path("distilbert-base-uncased")  # a folder of that name stands for the download
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdef"]))
    tokenizer = transformers.BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=512)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    model = transformers.DistilBertModel(
        transformers.DistilBertConfig(vocab_size=11, dim=16, n_heads=2, hidden_dim=32)
    ).eval()
    model.save_pretrained(folder)
    predictions, references = ["a b c", "d", "", "f"], ["a c b", "d e", "a", ""]
    expected = []
    for pair in zip(predictions[:2], references[:2], strict=True):
        ids = [tokenizer(text, return_tensors="pt") for text in pair]
        with torch.inference_mode():
            states = [model(**x, output_hidden_states=True).hidden_states[5][0] for x in ids]
        p, r = (torch.nn.functional.normalize(state, dim=-1) for state in states)
        precision, recall = ((p @ r.T).amax(1 - i)[1:-1].mean() for i in (0, 1))
        expected.append(float(2 * precision * recall / (precision + recall)))
    assert metrics.bertscore(predictions, references) == pytest.approx([*expected, 0, 0], abs=1e-5)


def test_what_metrics_need_is_said(monkeypatch):
    nltk = pytest.importorskip("nltk")
    monkeypatch.setattr(nltk.data, "path", [])
    fresh = nltk.corpus.util.LazyCorpusLoader("wordnet", nltk.corpus.WordNetCorpusReader, None)
    monkeypatch.setattr(nltk.corpus, "wordnet", fresh)  # the other tests' may be loaded
    with pytest.raises(ValueError, match=r"python -m nltk.downloader wordnet punkt_tab"):
        metrics.meteor_scorer()
    monkeypatch.setitem(sys.modules, "nltk", None)
    with pytest.warns(UserWarning, match="METEOR is left out.*pip install nltk"):
        assert "METEOR" not in metrics.statistics(["a"], ["a"])
    monkeypatch.setitem(sys.modules, "bert_score", None)
    with pytest.raises(ValueError, match="pip install bert-score"):
        metrics.bertscore(["a"], ["a"])


# ------------------------------------------------------------------------------------------ intervals


def test_resampling_sums_is_scoring_the_resampled_reports(no_meteor, monkeypatch):
    monkeypatch.setattr(metrics, "RESAMPLES", 3)
    pairs = random_pairs(25)[:25]
    table = metrics.statistics(*zip(*pairs, strict=True))
    drawn = metrics.resample(table, seed=4)
    generator = np.random.default_rng(4)
    for i in range(3):
        again = [pairs[j] for j in generator.integers(25, size=25)]
        fresh = metrics.statistics(*zip(*again, strict=True))
        for key, column in fresh.items():
            assert drawn[key][i] == pytest.approx(metrics.score_of(column.sum(0), 25), abs=1e-9), key


def test_intervals_cover_the_truth():
    """Of 200 samples of 80 reports from a population, about 95 % of the intervals hold the population's score."""
    generator = np.random.default_rng(0)
    size = generator.integers(5, 60, 20000)
    chance = generator.beta(4, 3, size.shape)
    counts = np.stack([generator.binomial(size - n, chance ** (n + 1)) for n in range(2)], axis=1)
    lengths = [size, size - 1, size, size + generator.integers(-4, 8, size.shape)]
    population = {"BLEU2": np.column_stack([counts, *lengths]), "mean": 100 * generator.beta(0.5, 0.5, (20000, 1))}
    truth = {key: metrics.score_of(column.sum(0), 20000) for key, column in population.items()}
    held = dict.fromkeys(truth, 0)
    for seed in range(200):
        chosen = generator.choice(20000, 80)
        sample = {key: column[chosen] for key, column in population.items()}
        for key, found in metrics.intervals(sample, {"all": np.ones(80, bool)}, seed).items():
            held[key] += found["all"].low <= truth[key] <= found["all"].high
    assert all(0.90 <= count / 200 <= 0.985 for count in held.values()), held


def test_paired_differences_are_tighter_than_two_intervals(no_meteor):
    pairs = random_pairs(200)[:200]
    predictions, references = zip(*pairs, strict=True)
    a = metrics.statistics(predictions, references)
    b = metrics.statistics([re.sub(r"((\w+\W+){9})\w+", r"\1x", text) for text in predictions], references)
    groups = {"all": np.ones(200, bool)}
    one, two, gap = metrics.differences(a, b, groups)["ROUGE-L"]["all"]
    alone = metrics.intervals(a, groups)["ROUGE-L"]["all"]
    assert gap.value == pytest.approx(two - one)
    assert gap.low < gap.value < gap.high < 0  # every tenth word is wrong, and it shows
    assert gap.high - gap.low < (alone.high - alone.low) / 2
    same = metrics.differences(a, a, groups)["BLEU4"]["all"][2]
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_scoring_takes_well_under_30_s_for_2461_pairs(nltk_data):
    pairs = random_pairs(246)
    begin = time.process_time()
    table = metrics.statistics(*zip(*pairs, strict=True))
    metrics.intervals(table, {"all": np.ones(len(pairs), bool)})
    assert time.process_time() - begin < 30 * len(pairs) / 2461


# ------------------------------------------------------------------------------------------ command line


def write_lines(path: Path, records) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture
def files(tmp_path, no_meteor):
    """Five studies, three with a prior, one with the current image in its place; the answers in another order."""
    references = ["Stable heart.", "New edema.", "Clear lungs.", "No change.", "Effusion."]
    images = [["a.png", "b.png"], ["c.png", "d.png"], ["e.png", "e.png"], "f.png", ["g.png", "h.png"]]
    questions = [{"question_id": i, "image": image, "text": "Findings?", "reference": text}
                 for i, (image, text) in enumerate(zip(images, references, strict=True))]  # fmt: skip
    answers = [{"question_id": i, "prompt": "", "text": text.replace("New", "Old"), "model_id": "tiny"}
               for i, text in enumerate(references)]  # fmt: skip
    return write_lines(tmp_path / "q.jsonl", questions), write_lines(tmp_path / "a.jsonl", answers[::-1])


def score(references, predictions, *more) -> int:
    return evaluation.main(
        evaluation.parse(["score", "--references", references, "--predictions", predictions, *map(str, more)])
    )


def test_the_published_dict_and_row(tmp_path, nltk_data, capsys):
    sides = {side: [{"question_id": f"{i}", key: text} for i, text in enumerate(LEXICAL[side])]
             for side, key in {"references": "reference", "predictions": "text"}.items()}  # fmt: skip
    references, predictions = (write_lines(tmp_path / f"{side}.jsonl", records) for side, records in sides.items())
    assert evaluation.evaluate_report(references, predictions) == LEXICAL["published_row"]
    for _ in range(2):
        assert score(references, predictions, "--csv", tmp_path / "s.csv", "--model-name", 'a "b", c') == 0
    header, *rows = csv.reader((tmp_path / "s.csv").read_text().splitlines())
    assert header == ["Model Name", "BLEU1", "BLEU2", "BLEU3", "BLEU4", "METEOR", "ROUGE-L", "Bert_score",
                      "Temporal_entity_score"]  # fmt: skip
    assert len(rows) == 2 and rows[0] == rows[1]
    row = dict(zip(header, rows[0], strict=True))
    assert (row.pop("Model Name"), row.pop("Bert_score")) == ('a "b", c', "")
    assert {key: float(value) for key, value in row.items()} == LEXICAL["published_row"]
    assert "59.22" in capsys.readouterr().out


def test_scores_are_split_by_prior_and_the_floor_stands_beside(files, capsys):
    assert score(*files, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["model"] == "tiny"
    assert result["studies"] == {"all": 5, "with prior": 3, "without prior": 2}
    temporal = {group: found["value"] for group, found in result["scores"]["Temporal_entity_score"].items()}
    assert temporal == pytest.approx({"all": 80, "with prior": 200 / 3, "without prior": 100}, abs=1e-6)
    floor = {group: found["value"] for group, found in result["scores"]["Temporal_floor"].items()}
    assert floor == pytest.approx({"all": 40, "with prior": 100 / 3, "without prior": 50})
    low, high = (result["scores"]["ROUGE-L"]["all"][end] for end in ("low", "high"))
    assert low < result["scores"]["ROUGE-L"]["all"]["value"] == 90 <= high
    assert score(*files, "--json") == 0 and json.loads(capsys.readouterr().out) == result  # seeded
    assert score(*files) == 0
    table = capsys.readouterr().out
    assert "all (5)" in table and "never mentions change" in table and "90.00 [" in table


def test_without_images_nobody_knows_of_priors(tmp_path, no_meteor):
    records = [{"question_id": 1, "findings": "a"}, {"question_id": "2", "impression": "b"}]
    questions = write_lines(tmp_path / "q", records)
    answers = write_lines(tmp_path / "a", [{"question_id": "1", "text": "a"}, {"question_id": 2, "text": "b"}])
    pairs = evaluation.read_pairs(questions, answers)
    assert [pair.reference for pair in pairs] == ["a", "b"]
    assert list(evaluation.groups_of(pairs)) == ["all"]


def test_compare_prints_paired_differences(files, tmp_path, capsys):
    better = write_lines(tmp_path / "b.jsonl", [
        {"question_id": line["question_id"], "text": line["reference"]} for line in evaluation.read_lines(files[0])
    ])  # fmt: skip
    arguments = ["score", "--references", files[0], "--compare", files[1], better]
    assert evaluation.main(evaluation.parse([*arguments, "--json"])) == 0
    result = json.loads(capsys.readouterr().out)["scores"]["ROUGE-L"]
    assert (result["all"]["a"], result["all"]["b"], result["all"]["difference"]["value"]) == (90, 100, 10)
    assert result["without prior"]["difference"] == {"value": 0, "low": 0, "high": 0}
    assert evaluation.main(evaluation.parse(arguments)) == 0
    assert "with prior (3)" in capsys.readouterr().out


def test_export_and_merge_go_to_radeval_and_back(files, tmp_path, capsys):
    exported, merged, table = (tmp_path / name for name in ("pairs.json", "radeval.json", "s.csv"))
    assert score(*files, "--export", exported) == 0
    lists = json.loads(exported.read_text())
    assert lists["references"] == ["Stable heart.", "New edema.", "Clear lungs.", "No change.", "Effusion."]
    assert lists["hypotheses"] == ["Stable heart.", "Old edema.", "Clear lungs.", "No change.", "Effusion."]
    merged.write_text(json.dumps({"radgraph_simple": [1, 0.5, 1, 1, 0], "f1chexbert_5_micro_f1": 0.75}))
    capsys.readouterr()
    page = tmp_path / "p.html"
    assert score(*files, "--merge", merged, "--csv", table, "--html", page, "--json") == 0
    scores = json.loads(capsys.readouterr().out)["scores"]
    assert scores["radgraph_simple"]["all"]["value"] == pytest.approx(0.7)
    assert scores["radgraph_simple"]["without prior"] == {"value": 1, "low": 1, "high": 1}
    assert scores["f1chexbert_5_micro_f1"] == {"all": {"value": 0.75, "low": None, "high": None}}
    row = next(csv.DictReader(table.read_text().splitlines()))
    assert (row["radgraph_simple"], row["f1chexbert_5_micro_f1"]) == ("0.7", "0.75")
    assert page.read_text().count("radgraph_simple") == 2  # a score, and a value of each study
    assert score(*files, "--merge", merged) == 0
    assert "radgraph_simple" in capsys.readouterr().out
    for content, message in {
        '{"radgraph_simple": [1, 2]}': "neither a number nor 5 numbers",
        '{"a": {"b": 1}}': "neither a number nor 5 numbers",
        '{"a": NaN}': "neither a number nor 5 numbers",
        '{"BLEU1": 1}': "BLEU1 is there already",
        "[1]": "no JSON object",
        "x": "is not JSON",
    }.items():
        merged.write_text(content)
        assert score(*files, "--merge", merged) == 2
        assert message in one_line(capsys)


def one_line(capsys) -> str:
    printed = capsys.readouterr()
    assert not printed.out and printed.err.count("\n") == 1 and printed.err.startswith("eval.py: ")
    return printed.err


def test_wrong_files_are_told_in_one_line(files, tmp_path, capsys):
    questions, answers = map(evaluation.read_lines, files)
    only_text = [{key: value for key, value in line.items() if key != "reference"} for line in questions]
    twice = [*answers[1:], answers[1], {**answers[2], "question_id": "x"}]
    cases = [
        (questions, twice, "1 ids come twice in"),
        (questions, twice, "1 ids of .*q.* are missing in .* .first: 4.; 1 ids of .* are not in .* .first: x."),
        (questions, answers[:2], "3 ids of .* are missing"),
        (only_text, answers, "0 has none of reference, findings, impression: add its report"),
        ([{**line, "reference": 3} for line in questions], answers, "has no text in reference"),
        ([{**line, "image": [1]} for line in questions], answers, "q.*: image .1. is neither a file name"),
        (questions, [{"question_id": line["question_id"]} for line in answers], "none of findings, impression, text"),
        (questions, [{"text": "a"}], "line 1 has no question_id"),
        ([], answers, "is empty"),
    ]
    for references, predictions, message in cases:
        q, a = write_lines(tmp_path / "bad_q", references), write_lines(tmp_path / "bad_a", predictions)
        assert score(q, a) == 2
        assert re.search(message, one_line(capsys)), message
    for content in (b'{"\n', b'{"question_id": "\xff"}\n', b"12\n"):
        (tmp_path / "bad_a").write_bytes(content)
        assert score(files[0], str(tmp_path / "bad_a")) == 2
        assert "line 1" in one_line(capsys)
    assert score(files[0], str(tmp_path / "nowhere")) == 2
    assert "nowhere" in one_line(capsys)


def test_a_foreign_csv_is_refused_and_left_alone(files, tmp_path, capsys):
    table = tmp_path / "s.csv"
    table.write_text("name,score\na,1\n")
    assert score(*files, "--csv", table) == 2
    assert "has the columns name, score" in one_line(capsys)
    assert table.read_text() == "name,score\na,1\n"


@pytest.mark.parametrize(("arguments", "message"), [
    (["score", "--references", "q"], "one of the arguments --predictions --compare is required"),
    (["score", "--references", "q", "--compare", "a", "b", "--csv", "c"], "--csv goes with --predictions"),
    (["score", "--references", "q", "--predictions", "a", "--image-folder", "c"], "give --html as well"),
    (["score", "--references", "q", "--predictions", "a", "--htlm", "c"], "did you mean --html"),
    (["scores"], "invalid choice"),
])  # fmt: skip
def test_wrong_arguments_are_told_in_one_line(arguments, message):
    result = subprocess.run([sys.executable, ROOT / "eval.py", *arguments], capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and message in result.stderr, result.stderr


def test_help_is_quick():
    begin = seconds_of_children()
    subprocess.run([sys.executable, ROOT / "eval.py", "score", "--help"], check=True, capture_output=True)
    assert seconds_of_children() - begin < 1


# ------------------------------------------------------------------------------------------ phantom reports


def test_a_change_of_severity_is_turned_round_where_two_reports_tell_opposites():
    truth = {"changes": {"edema": "worse", "nodule": "improved", "atelectasis": "new", "consolidation": "unchanged"}}
    edema, nodule = "Mild pulmonary edema has {}.", "The small left mid lung nodule has {}."
    one = " ".join((edema.format("worsened"), nodule.format("decreased"), "New left basilar atelectasis is seen."))
    other = " ".join((edema.format("improved"), nodule.format("decreased"), "Left basilar atelectasis has improved."))
    assert truth_scores.severity_flips(one, other, truth) == truth_scores.severity_flips(other, one, truth) == (1, 2)
    assert truth_scores.severity_flips(one, one, truth) == truth_scores.severity_flips("", other, truth) == (0, 2)
    assert truth_scores.severity_flips(one, other, {"changes": {}}) == (0, 0)


def test_phantom_truth_is_scored(files, tmp_path, capsys):
    base = {"subject_id": 1, "prior_study_id": 2, "devices": {"pacemaker": {"side": "left"}}, "changes": {}}
    truths = [base | {"study_id": i, "dicom_id": f"d{i}", "findings": {"edema": {"side": "bilateral", "severity": 0.5}},
                      "changes": {"edema": "worse", "nodule": "resolved"}} for i in range(3)]  # fmt: skip
    truths[2] |= {"findings": {"nodule": {"side": "left", "severity": 0.1}}, "changes": {}}
    texts = [
        "Moderate pulmonary edema has worsened. The nodule has resolved. A pacemaker is seen.",  # all right
        "Severe edema is unchanged.",  # wrong severity, direction; a change, a device missing
        "There is small right nodule. New edema. No pacemaker.",  # wrong side, a finding too many, a device missing
    ]
    questions = write_lines(tmp_path / "q", [
        {"question_id": i, "image": f"files/p1/d{i}.jpg", "reference": "x"} for i in range(3)
    ])  # fmt: skip
    answers = write_lines(tmp_path / "a", [{"question_id": i, "text": text} for i, text in enumerate(texts)])
    truth = write_lines(tmp_path / "t", truths)
    written = ("--csv", tmp_path / "s.csv", "--html", tmp_path / "p.html")
    assert score(questions, answers, "--truth", truth, "--json", *written) == 0
    scores = json.loads(capsys.readouterr().out)["scores"]
    values = {key: round(found["all"]["value"], 2) if found else None for key, found in scores.items()}
    assert values | {
        "findings precision": 75, "findings recall": 100, "findings F1": 85.71, "edema precision": 66.67,
        "edema recall": 100, "nodule F1": 100, "devices precision": 100, "devices recall": 33.33, "devices F1": 50,
        "pneumothorax F1": None, "side": 0, "severity": 66.67, "direction of change": 50,
    } == values  # fmt: skip
    row = next(csv.DictReader((tmp_path / "s.csv").read_text().splitlines()))
    assert (row["findings F1"], row["pneumothorax F1"]) == ("85.7143", "")
    assert score(*files, "--truth", truth) == 2
    assert "no line for 2 of 5 studies (first: 3)" in one_line(capsys)
    assert score(questions, answers, "--truth", questions) == 2
    assert "line 1 is no line of a phantom hospital's truth" in one_line(capsys)


def test_the_phantom_s_own_reports_score_all():
    states = [state for patient in range(60) for state in phantom.history(0, patient)]
    texts = [re.search("FINDINGS:(.*)IMPRESSION:", phantom.report(state), re.S)[1] for state in states]
    for key, column in truth_scores.truth_statistics(texts, list(map(phantom.truth_of, states))).items():
        assert metrics.score_of(column.sum(0), len(states)) == 100, key
