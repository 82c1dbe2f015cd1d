"""int8 weights. Oracles: float32, hand-worked numbers, and the plain version beside PyTorch's CPU kernel."""

import json
import logging

import pytest
import torch
import torch.nn.functional as F
from conftest import FAMILIES, GOLDEN, change, load, read_lines, relative, study_of, write_lines
from safetensors.torch import load_file, save_file

import eval as evaluation
import model
import sample
import train
from model import Libra
from plumbing import int8
from sample import Chat, Study, generate

SEVEN = GOLDEN / "libra-7b" / "model"
STUDY = study_of(json.loads((GOLDEN / "libra-7b" / "case0" / "expected.json").read_text()))


def read_int8(source, **options) -> Libra:
    return Libra.from_pretrained(source, **dict(device="cpu", dtype="int8") | options)


@torch.no_grad()
def decoder_logits(libra, seed=0):
    ids = torch.randint(3, 500, (1, 21), generator=torch.Generator().manual_seed(seed))
    return libra.logits(libra.decoder(libra.decoder.embed_tokens(ids), torch.arange(21)[None]))


def same_bits(one: Libra, other: Libra):
    """Both have the same int8 weights and scales."""
    other = dict(other.decoder.named_parameters())
    for name, parameter in one.decoder.named_parameters():
        if parameter.dtype == torch.int8 or name.endswith("_scale"):
            assert parameter.dtype == other[name].dtype and torch.equal(parameter, other[name]), name


def quantised(source):
    linear = torch.nn.Linear(source.shape[1], len(source), bias=False)
    linear.weight.data = source
    return int8.Int8Linear(linear)


def test_a_row_is_rounded_to_the_nearest_of_255_steps():
    layer = quantised(torch.tensor([[254.0, -3.0, 2.9, 0.0], [0.0, 0.0, 0.0, 0.0], [-1e-42, 0.0, 1e-42, 0.0]]))
    assert layer.weight[0].tolist() == [127, -2, 1, 0] and layer.weight_scale[0] == 2
    assert not layer.weight[1:].any() and layer.weight_scale.isfinite().all()


@pytest.mark.parametrize("rows, columns, height", [(1, 32, 1), (3, 96, 5), (1, 32, 130), (70, 160, 31), (2, 1056, 67)])
def test_the_cpu_kernel_computes_what_the_plain_version_does(rows, columns, height, monkeypatch):
    monkeypatch.setitem(int8.BLOCKS, "cpu", 300)  # several blocks
    torch.manual_seed(0)  # one output may be near zero by chance, and its relative error large
    layer, x, bias = quantised(torch.randn(height, columns)), torch.randn(1, rows, columns), torch.randn(height)
    weights = layer.weight, layer.weight_scale, bias
    expected = F.linear(x, layer.weight * layer.weight_scale[:, None], bias)
    assert relative(int8.plain_linear(x, *weights), expected) < 1e-5
    assert relative(int8.cpu_linear(x, *weights), expected) < 1e-2
    assert relative(layer(x) + bias, expected) < 1e-2
    # a row's bits do not depend on the rows beside it
    assert torch.equal(int8.cpu_linear(x, *weights)[:, :1], int8.cpu_linear(x[:, :1], *weights))


@pytest.mark.parametrize("columns", [1, 7, 33, 100])
def test_rows_of_odd_length_are_left_to_the_plain_version(columns):
    layer, x = quantised(torch.randn(5, columns)), torch.randn(1, 2, columns)
    assert torch.equal(layer(x), int8.plain_linear(x, layer.weight, layer.weight_scale))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_stays_near_float32_and_loads_again_as_it_was_saved(family, tmp_path):
    libra = read_int8(GOLDEN / family / "model")
    assert relative(decoder_logits(libra), decoder_logits(load(family))) < 0.05
    libra.save_pretrained(tmp_path / "out", shard_size=50_000)
    again = Libra.from_pretrained(tmp_path / "out", device="cpu")
    same_bits(libra, again)
    assert torch.equal(decoder_logits(libra), decoder_logits(again))


@pytest.mark.parametrize("options", [{}, dict(num_beams=3), dict(temperature=1.0, seed=1)])
def test_a_study_has_the_same_report_in_a_batch_and_in_a_chat(options):
    libra, options = read_int8(SEVEN), options | dict(max_new_tokens=12)
    alone = generate(libra, STUDY, **options)
    assert generate(libra, [STUDY, STUDY], **options)[0][0].token_ids == alone[0].token_ids
    assert Chat(libra, STUDY).ask(STUDY.query, **options)


def test_eval_answers_in_batches_what_generate_gives_each_study(tmp_path):
    pairs = [["0.png", "1.png"], ["2.png"], ["3.png", "4.png"]]
    lines = [{"question_id": number, "image": pair, "text": STUDY.query} for number, pair in enumerate(pairs)]
    arguments = ["answer", "--questions", write_lines(tmp_path / "q.jsonl", lines), "--answers", tmp_path / "a.jsonl"]
    arguments += ["--image-folder", GOLDEN / "images", "--model", SEVEN, "--device", "cpu", "--dtype", "int8"]
    arguments += ["--batch-size", 2, "--num-beams", 3, "--max-new-tokens", 12]
    assert evaluation.main(evaluation.parse([*map(str, arguments)])) == 0
    libra = read_int8(SEVEN)
    for pair, line in zip(pairs, read_lines(tmp_path / "a.jsonl"), strict=True):
        study = Study(*(GOLDEN / "images" / name for name in pair), query=STUDY.query)
        assert line["text"] == generate(libra, study, num_beams=3, max_new_tokens=12)[0].text


def test_a_chat_at_the_command_line_says_which_kernel_runs(monkeypatch, capsys, caplog):
    typed = iter(["Has it changed?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    int8._messages.clear()
    arguments = ["--model", SEVEN, "--images", GOLDEN / "images" / "0.png", "--device", "cpu", "--dtype", "int8"]
    arguments += ["--chat", "--verbose", "--max-new-tokens", 6, "--query", STUDY.query]
    assert sample.main(sample.parse([*map(str, arguments)])) == 0
    chat = Chat(read_int8(SEVEN), Study(GOLDEN / "images" / "0.png"))
    answers = [chat.ask(question, max_new_tokens=6).text for question in (STUDY.query, "Has it changed?")]
    printed = capsys.readouterr().out
    assert all(answer in printed for answer in answers)
    assert len([message for message in caplog.messages if message.startswith("int8: ")]) == 1


def test_without_the_kernel_the_plain_version_runs_and_says_so(monkeypatch, caplog):
    libra = read_int8(SEVEN)
    with_kernel = decoder_logits(libra)
    monkeypatch.setattr(int8, "CPU_VECTORS", "DEFAULT")
    int8._messages.clear()
    with caplog.at_level(logging.INFO, "plumbing.int8"):
        assert relative(decoder_logits(libra), with_kernel) < 0.02
    assert [message.split(":")[1] for message in caplog.messages] == [" no kernel for this cpu"]


def test_on_a_gpu_few_rows_go_to_the_kernel_and_more_are_expanded(monkeypatch, caplog):
    calls = []
    monkeypatch.setattr(int8, "has_cpu_kernel", lambda x: False)
    monkeypatch.setattr(int8, "has_gpu_kernel", lambda device: True)
    monkeypatch.setattr(int8, "int8_linear", lambda x, weight, scale: calls.append(len(x)) or x.new_zeros(len(x), 5))
    int8._messages.clear()
    layer = quantised(torch.randn(5, 32))
    with caplog.at_level(logging.INFO, "plumbing.int8"):
        shapes = [layer(torch.randn(*size, 32)).shape for size in ((2, 1), (4, 64), (1, 257))]
    assert shapes == [(2, 1, 5), (4, 64, 5), (1, 257, 5)] and calls == [2, 256]
    assert ["Triton" in message for message in caplog.messages] == [True, False]


def test_a_layer_compiles_as_one_graph():
    layer, x = quantised(torch.randn(5, 32)), torch.randn(1, 3, 32)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))


def test_an_adapter_is_merged_before_weights_are_rounded(tmp_path):
    libra = read_int8(GOLDEN / "adapters" / "lora", base=SEVEN)
    Libra.from_pretrained(GOLDEN / "adapters" / "lora", base=SEVEN, device="cpu").save_pretrained(tmp_path / "merged")
    same_bits(libra, read_int8(tmp_path / "merged"))


def test_the_command_line_writes_8_bits_beside_the_type_of_the_checkpoint(tmp_path, capsys):
    arguments = ["--model", str(SEVEN), "--out", str(tmp_path / "out"), "--dtype", "int8"]
    assert model.main(arguments) == 0
    stored = load_file(tmp_path / "out" / "model.safetensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    name = "model.layers.0.mlp.up_proj.weight"
    assert stored[name].dtype == torch.int8 and stored[f"{name}_scale"].dtype == torch.float32
    assert config["mm_weights"] == "int8"
    assert str(stored["model.embed_tokens.weight"].dtype) == f"torch.{config['torch_dtype']}"
    assert torch.equal(decoder_logits(read_int8(SEVEN)), decoder_logits(read_int8(tmp_path / "out")))


@pytest.fixture
def saved(tmp_path):
    read_int8(SEVEN).save_pretrained(tmp_path / "int8")
    return tmp_path / "int8"


def test_another_dtype_is_refused(saved):
    with pytest.raises(ValueError, match="int8 weights, which do not become float32 again"):
        read_int8(saved, dtype="float32")


def test_training_adapters_and_stock_files_are_refused(saved, capsys, tmp_path):
    config = train.TrainConfig(model=str(saved), out_dir=str(tmp_path / "run"))
    with pytest.raises(ValueError, match="int8 weights, which do not train"):
        train.build(config)
    with pytest.raises(ValueError, match="which take no adapter"):
        read_int8(GOLDEN / "adapters" / "lora", base=saved)
    with pytest.raises(ValueError, match="other programs do not know"):
        read_int8(saved).save_parts(tmp_path / "parts")


def test_whole_numbers_without_our_field_are_refused_by_name(saved):
    change(saved / "config.json", mm_weights=None)
    with pytest.raises(ValueError, match=r"not floating-point: decoder\.layers\.0"):
        read_int8(saved)


def test_a_damaged_weight_or_scale_is_refused_by_name(saved, tmp_path):
    file = saved / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(tensors | {f"{name}_scale": tensors[f"{name}_scale"] * torch.nan}, file)
    with pytest.raises(ValueError, match=r"up_proj\.weight_scale holds NaN"):
        read_int8(saved)
    save_file(tensors | {name: tensors[name].float()}, file)
    with pytest.raises(ValueError, match="1 not int8"):
        read_int8(saved)
    load("libra-7b").save_pretrained(tmp_path / "float")
    file = tmp_path / "float" / "model.safetensors"
    tensors = load_file(file)
    tensors[name][0, 0] = torch.nan
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"up_proj\.weight holds NaN"):
        read_int8(tmp_path / "float")
