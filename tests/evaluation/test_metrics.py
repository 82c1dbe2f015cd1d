"""Oracles: golden values of the published code, sacrebleu, rouge_score, nltk, transformers, and resampling by hand."""

import random
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import read, write_lines

import eval as cli
from evaluation import metrics

LEXICAL, TEMPORAL = read("text", "lexical.json"), read("text", "temporal_f1.json")
GOLDEN_NAMES = {"METEOR": "meteor", "ROUGE-L": "rougeL", "Temporal_entity_score": "temporal_f1"}
GOLDEN_NAMES |= {f"BLEU{n}": f"bleu{n}" for n in (1, 2, 3, 4)}


@pytest.fixture(scope="session")
def nltk_data(request):
    """NLTK with METEOR's data: where NLTK looks anyway, or put together from Debian's and a wheel's files."""
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
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", target.parents[2]]
    if subprocess.run([*command, "llama-index-core==0.14.25"], capture_output=True).returncode:
        pytest.skip("METEOR's punkt_tab is missing: pip download --no-deps llama-index-core==0.14.25 has it")
    wheel = next(target.parents[2].glob("llama_index_core-*.whl"))
    target.mkdir(parents=True)
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith(inside) and not name.endswith("/"):
                (target / Path(name).name).write_bytes(archive.read(name))
    wheel.unlink()


def random_pairs(count: int) -> list[tuple[str, str]]:
    """Pairs of reports shuffled together from the golden ones' sentences, and hand-made edges."""
    draw, sentences = random.Random(0), [s for text in LEXICAL["references"] for s in re.split(r"(?<=\.)\s", text) if s]
    pairs = []
    for _ in range(count):
        reference = draw.choices(sentences, k=draw.randint(1, 7))
        prediction = [s for s in reference if draw.random() < 0.7] + draw.choices(sentences, k=draw.randint(0, 3))
        shortened = " ".join(word for word in " ".join(prediction).split() if draw.random() < 0.9)
        pairs.append((shortened, " ".join(reference)))
    edges = ["", "a", "No change.", "1.5 cm, 3,000 mL; 2.", "..", "Größe: 38.5°C — Δ", "心影 正常", "x " * 300]
    return pairs + [(a, b) for a in edges for b in edges]


def test_cleaning_is_the_published_one():
    assert list(map(metrics.clean, TEMPORAL["predictions"])) == TEMPORAL["clean"]
    for side in ("predictions", "references"):
        assert [metrics.clean(text.lower()) for text in LEXICAL[side]] == LEXICAL[f"clean_{side}"]


def test_temporal_f1_is_the_published_one():
    assert sorted(metrics.WORDS_OF_CHANGE) == TEMPORAL["keywords"]
    result = cli.temporal_f1_score(TEMPORAL["predictions"], TEMPORAL["references"])
    for side in ("prediction_entities", "reference_entities"):
        assert [sorted(entities) for entities in result[side]] == TEMPORAL[side]
    each = map(metrics.temporal_f1, result["prediction_entities"], result["reference_entities"])
    assert list(each) == pytest.approx(TEMPORAL["each"], abs=1e-15)
    assert result["f1"] == pytest.approx(TEMPORAL["f1"], abs=1e-12)
    first_two = cli.temporal_f1_score(TEMPORAL["predictions"][:2], TEMPORAL["references"][:2])
    assert first_two["f1"] == pytest.approx(0.500000000075, abs=1e-15)


def test_several_references_of_a_prediction_are_united():
    several = TEMPORAL["multi"]
    united = cli.temporal_f1_score(several["predictions"], several["references"])
    assert united["f1"] == pytest.approx(several["f1"], abs=1e-12)
    with pytest.raises(ValueError, match="1 predictions and 2 references"):
        cli.temporal_f1_score(["a"], ["a", "b"])


def test_lexical_scores_are_the_published_ones(nltk_data):
    table = metrics.statistics(LEXICAL["predictions"], LEXICAL["references"])
    assert set(table) >= {*GOLDEN_NAMES, metrics.FLOOR}
    for key, name in GOLDEN_NAMES.items():
        assert metrics.corpus_score(table[key]) / 100 == pytest.approx(LEXICAL[name], abs=1e-9), key
        each = metrics.score_of(table[key], 1) / 100
        known = [value is not None for value in LEXICAL["each"][name]]  # the published BLEU divides by zero elsewhere
        assert each[known] == pytest.approx([v for v in LEXICAL["each"][name] if v is not None], abs=1e-9), key


def test_evaluate_report_gives_the_published_golden_row(nltk_data, tmp_path):
    files = []
    for side, key in {"references": "reference", "predictions": "text"}.items():
        lines = [{"question_id": f"{i}", key: text} for i, text in enumerate(LEXICAL[side])]
        files.append(write_lines(tmp_path / side, lines))
    assert cli.evaluate_report(*files) == LEXICAL["published_row"]


def test_meteor_is_nltk_s(nltk_data):
    from nltk import word_tokenize
    from nltk.translate.meteor_score import meteor_score

    meteor = metrics.meteor_scorer()
    for prediction, reference in random_pairs(30):
        direct = meteor_score([word_tokenize(reference)], word_tokenize(prediction))
        assert meteor(prediction, reference) == pytest.approx(direct, abs=1e-12)


def test_bleu_is_sacrebleu_s_without_smoothing():
    sacrebleu = pytest.importorskip("sacrebleu")
    pairs = random_pairs(300)
    # lists as sacrebleu takes them: it drops nothing, and neither do we
    for chosen in [pairs, *([pair] for pair in pairs if all(pair)), pairs[-20:]]:
        rows = [metrics.bleu_rows(*pair) for pair in chosen]
        for n in (1, 2, 3, 4):
            ours = metrics.corpus_score(np.array([row[n - 1] for row in rows]))
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
    config = transformers.DistilBertConfig(vocab_size=11, dim=16, n_heads=2, hidden_dim=32)
    model = transformers.DistilBertModel(config).eval()
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


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "nltk", None)
    with pytest.warns(UserWarning, match=r"METEOR is left out.*pip install nltk.*wordnet punkt_tab"):
        assert "METEOR" not in metrics.statistics(["a"], ["a"])
    monkeypatch.setitem(sys.modules, "bert_score", None)
    with pytest.raises(ValueError, match="pip install bert-score"):
        metrics.bertscore(["a"], ["a"])


def test_resampling_sums_is_scoring_the_resampled_reports(no_meteor, monkeypatch):
    monkeypatch.setattr(metrics, "RESAMPLES", 3)
    pairs = random_pairs(25)[:25]
    drawn = metrics.resample(metrics.statistics(*zip(*pairs, strict=True)), seed=4)
    generator = np.random.default_rng(4)
    for i in range(3):
        again = [pairs[j] for j in generator.integers(25, size=25)]
        for key, rows in metrics.statistics(*zip(*again, strict=True)).items():
            assert drawn[key][i] == pytest.approx(metrics.corpus_score(rows), abs=1e-9), key


def test_intervals_cover_the_truth():
    """Of 200 samples of 80 reports from a population, about 95 % of the intervals hold the population's score."""
    generator = np.random.default_rng(0)
    size = generator.integers(5, 60, 20000)
    chance = generator.beta(4, 3, size.shape)
    counts = np.stack([generator.binomial(size - n, chance ** (n + 1)) for n in range(2)], axis=1)
    lengths = [size, size - 1, size, size + generator.integers(-4, 8, size.shape)]
    population = {"BLEU2": np.column_stack([counts, *lengths]), "mean": 100 * generator.beta(0.5, 0.5, (20000, 1))}
    truth = {key: metrics.corpus_score(rows) for key, rows in population.items()}
    hits = dict.fromkeys(truth, 0)
    for seed in range(200):
        chosen = generator.choice(20000, 80)
        sample = {key: rows[chosen] for key, rows in population.items()}
        for key, found in metrics.intervals(sample, {"all": np.ones(80, bool)}, seed).items():
            hits[key] += found["all"].low <= truth[key] <= found["all"].high
    assert all(0.90 <= count / 200 <= 0.985 for count in hits.values()), hits


def test_paired_differences_are_tighter_than_two_intervals(no_meteor):
    predictions, references = zip(*random_pairs(200)[:200], strict=True)
    worse = [re.sub(r"((\w+\W+){9})\w+", r"\1x", text) for text in predictions]  # every tenth word is wrong
    a, b = metrics.statistics(predictions, references), metrics.statistics(worse, references)
    groups = {"all": np.ones(200, bool)}
    found = metrics.differences(a, b, groups)["ROUGE-L"]["all"]
    alone, gap = metrics.intervals(a, groups)["ROUGE-L"]["all"], found["difference"]
    assert gap.value == pytest.approx(found["b"] - found["a"])
    assert gap.low < gap.value < gap.high < 0
    assert gap.high - gap.low < (alone.high - alone.low) / 2
    assert metrics.differences(a, a, groups)["BLEU4"]["all"]["difference"] == metrics.Interval(0, 0, 0)
