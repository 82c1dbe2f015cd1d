"""int8 and int4 weights. Oracles: float32, hand-worked numbers, the plain version beside PyTorch's CPU kernels."""

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
from plumbing import quantised
from sample import Chat, Study, generate

SEVEN = GOLDEN / "libra-7b" / "model"
STUDY = study_of(json.loads((GOLDEN / "libra-7b" / "case0" / "expected.json").read_text()))


KINDS = pytest.mark.parametrize("kind", ["int8", "int4"])


def read(source, kind="int8", **options) -> Libra:
    return Libra.from_pretrained(source, **dict(device="cpu", dtype=kind) | options)


@torch.no_grad()
def decoder_logits(libra, seed=0):
    ids = torch.randint(3, 500, (1, 21), generator=torch.Generator().manual_seed(seed))
    return libra.logits(libra.decoder(libra.decoder.embed_tokens(ids), torch.arange(21)[None]))


def same_bits(one: Libra, other: Libra):
    """Both have the same rounded weights and scales."""
    other = dict(other.decoder.named_parameters())
    for name, parameter in one.decoder.named_parameters():
        if parameter.dtype in (torch.int8, torch.uint8) or name.endswith("_scale"):
            assert parameter.dtype == other[name].dtype and torch.equal(parameter, other[name]), name


def round_int8(source):
    return quantised.Int8Linear(linear_of(source))


def linear_of(source):
    linear = torch.nn.Linear(source.shape[1], len(source), bias=False)
    linear.weight.data = source
    return linear


def test_a_row_is_rounded_to_the_nearest_of_255_steps():
    layer = round_int8(torch.tensor([[254.0, -3.0, 2.9, 0.0], [0.0, 0.0, 0.0, 0.0], [-1e-42, 0.0, 1e-42, 0.0]]))
    assert layer.weight[0].tolist() == [127, -2, 1, 0] and layer.weight_scale[0] == 2
    assert not layer.weight[1:].any() and layer.weight_scale.isfinite().all()


def test_a_group_of_32_columns_on_16_steps_keeps_its_numbers():
    steps = torch.arange(64).remainder(16).sub(8).float()  # two groups, each with all steps
    source = torch.stack((0.5 * steps + 3, -0.25 * steps, torch.zeros(64), torch.full((64,), 5.0)))
    layer = quantised.Int4Linear(linear_of(source))
    assert torch.equal(quantised.expand(layer.weight, layer.weight_scale), source)
    assert layer.weight[0, :2].tolist() == [0x10, 0x32]
    assert layer.weight_scale[0].tolist() == [[0.5, 3], [0.5, 3]]


def test_the_search_is_nearer_than_the_range_of_a_group():
    torch.manual_seed(0)
    source = torch.randn(64, 256)
    layer = quantised.Int4Linear(linear_of(source))
    groups = source.unflatten(1, (-1, 32))
    low, high = groups.amin(-1, True), groups.amax(-1, True)
    by_range = ((groups - low) / (high - low) * 15).round() / 15 * (high - low) + low
    found = quantised.expand(layer.stored("weight"), layer.stored("weight_scale"))
    assert relative(found, source) < 0.95 * relative(by_range.flatten(1), source)


@pytest.mark.parametrize("rows, columns, height", [(1, 32, 64), (3, 96, 128), (70, 160, 1088), (2, 1056, 192)])
def test_the_kernel_of_4_bits_computes_what_the_plain_version_does(rows, columns, height):
    torch.manual_seed(0)
    layer, x = quantised.Int4Linear(linear_of(torch.randn(height, columns))), torch.randn(1, rows, columns)
    layer.bias = torch.nn.Parameter(torch.randn(height), requires_grad=False)
    stored = layer.stored("weight"), layer.stored("weight_scale")
    expected = F.linear(x, quantised.expand(*stored), layer.bias)
    assert layer.is_packed and relative(layer(x), expected) < 1e-2
    assert relative(quantised.plain_linear(x, *stored, layer.bias), expected) < 1e-5
    # a row's bits do not depend on the rows beside it
    assert torch.equal(layer(x)[:, :1], layer(x[:, :1]))


def test_the_layout_of_the_kernel_is_left_on_the_way_to_another_device(monkeypatch):
    layer = quantised.Int4Linear(linear_of(torch.randn(128, 64)))
    stored = [layer.stored(name).clone() for name in ("weight", "weight_scale")]
    monkeypatch.setattr(quantised, "CPU_VECTORS", "DEFAULT")
    plain = [*quantised.Int4Linear(linear_of(torch.zeros(128, 64))).parameters()]
    monkeypatch.undo()
    assert [tensor.shape for tensor in stored] == [tensor.shape for tensor in plain]
    packed = [parameter.clone() for parameter in layer.parameters()]
    monkeypatch.setattr(layer, "pack", lambda: None)  # as on a device without the kernel
    layer.to("cpu")
    assert all(map(torch.equal, layer.parameters(), stored))
    monkeypatch.undo()
    layer.to("cpu")
    assert layer.is_packed and all(map(torch.equal, layer.parameters(), packed))


@pytest.mark.parametrize("rows, columns, height", [(1, 32, 1), (3, 96, 5), (1, 32, 130), (70, 160, 31), (2, 1056, 67)])
def test_the_cpu_kernel_computes_what_the_plain_version_does(rows, columns, height, monkeypatch):
    monkeypatch.setitem(quantised.BLOCKS, "cpu", 300)  # several blocks
    torch.manual_seed(0)  # one output may be near zero by chance, and its relative error large
    layer, x, bias = round_int8(torch.randn(height, columns)), torch.randn(1, rows, columns), torch.randn(height)
    weights = layer.weight, layer.weight_scale, bias
    expected = F.linear(x, layer.weight * layer.weight_scale[:, None], bias)
    assert relative(quantised.plain_linear(x, *weights), expected) < 1e-5
    assert relative(quantised.cpu_linear(x, *weights), expected) < 1e-2
    assert relative(layer(x) + bias, expected) < 1e-2
    # a row's bits do not depend on the rows beside it
    assert torch.equal(quantised.cpu_linear(x, *weights)[:, :1], quantised.cpu_linear(x[:, :1], *weights))


@pytest.mark.parametrize("columns", [1, 7, 33, 100])
def test_rows_of_odd_length_are_left_to_the_plain_version(columns):
    layer, x = round_int8(torch.randn(5, columns)), torch.randn(1, 2, columns)
    assert torch.equal(layer(x), quantised.plain_linear(x, layer.weight, layer.weight_scale))


@KINDS
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_stays_near_float32_and_loads_again_as_it_was_saved(family, kind, tmp_path):
    libra = read(GOLDEN / family / "model", kind)
    limit = {"int8": 0.05, "int4": 0.5}[kind]
    assert relative(decoder_logits(libra), decoder_logits(load(family))) < limit
    libra.save_pretrained(tmp_path / "out", shard_size=50_000)
    again = Libra.from_pretrained(tmp_path / "out", device="cpu")
    same_bits(libra, again)
    assert torch.equal(decoder_logits(libra), decoder_logits(again))


@pytest.mark.parametrize("options", [{}, dict(num_beams=3), dict(temperature=1.0, seed=1)])
@KINDS
def test_a_study_has_the_same_report_in_a_batch_and_in_a_chat(options, kind):
    libra, options = read(SEVEN, kind), options | dict(max_new_tokens=12)
    alone = generate(libra, STUDY, **options)
    assert generate(libra, [STUDY, STUDY], **options)[0][0].token_ids == alone[0].token_ids
    assert Chat(libra, STUDY).ask(STUDY.query, **options)


@KINDS
def test_eval_answers_in_batches_what_generate_gives_each_study(kind, tmp_path):
    pairs = [["0.png", "1.png"], ["2.png"], ["3.png", "4.png"]]
    lines = [{"question_id": number, "image": pair, "text": STUDY.query} for number, pair in enumerate(pairs)]
    arguments = ["answer", "--questions", write_lines(tmp_path / "q.jsonl", lines), "--answers", tmp_path / "a.jsonl"]
    arguments += ["--image-folder", GOLDEN / "images", "--model", SEVEN, "--device", "cpu", "--dtype", kind]
    arguments += ["--batch-size", 2, "--num-beams", 3, "--max-new-tokens", 12]
    assert evaluation.main(evaluation.parse([*map(str, arguments)])) == 0
    libra = read(SEVEN, kind)
    for pair, line in zip(pairs, read_lines(tmp_path / "a.jsonl"), strict=True):
        study = Study(*(GOLDEN / "images" / name for name in pair), query=STUDY.query)
        assert line["text"] == generate(libra, study, num_beams=3, max_new_tokens=12)[0].text


@KINDS
def test_a_chat_at_the_command_line_says_which_kernel_runs(kind, monkeypatch, capsys, caplog):
    typed = iter(["Has it changed?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    quantised._messages.clear()
    arguments = ["--model", SEVEN, "--images", GOLDEN / "images" / "0.png", "--device", "cpu", "--dtype", kind]
    arguments += ["--chat", "--verbose", "--max-new-tokens", 6, "--query", STUDY.query]
    assert sample.main(sample.parse([*map(str, arguments)])) == 0
    chat = Chat(read(SEVEN, kind), Study(GOLDEN / "images" / "0.png"))
    answers = [chat.ask(question, max_new_tokens=6).text for question in (STUDY.query, "Has it changed?")]
    printed = capsys.readouterr().out
    assert all(answer in printed for answer in answers)
    assert len([message for message in caplog.messages if message.startswith(f"{kind}: PyTorch's CPU kernel")]) == 1


def test_without_the_kernel_the_plain_version_runs_and_says_so(monkeypatch, caplog):
    libra = read(SEVEN)
    with_kernel = decoder_logits(libra)
    monkeypatch.setattr(quantised, "CPU_VECTORS", "DEFAULT")
    quantised._messages.clear()
    caplog.clear()
    with caplog.at_level(logging.INFO, "plumbing.quantised"):
        assert relative(decoder_logits(libra), with_kernel) < 0.02
    assert [message.split(":")[1] for message in caplog.messages] == [" no kernel for this cpu"]


def test_layers_that_the_kernel_of_4_bits_does_not_take_say_so(monkeypatch, caplog):
    quantised._messages.clear()
    with caplog.at_level(logging.INFO, "plumbing.quantised"):
        quantised.Int4Linear(linear_of(torch.randn(48, 32)))(torch.randn(1, 2, 32))
        monkeypatch.setattr(quantised, "CPU_VECTORS", "DEFAULT")
        quantised.Int4Linear(linear_of(torch.randn(64, 32)))(torch.randn(1, 2, 32))
    reasons = [message.split(":")[1] for message in caplog.messages]
    assert reasons == [" no kernel for 48 rows", " no kernel for this cpu"]


def test_on_a_gpu_few_rows_go_to_the_kernel_and_more_are_expanded(monkeypatch, caplog):
    calls = []
    monkeypatch.setattr(quantised, "has_cpu_kernel", lambda x: False)
    monkeypatch.setattr(quantised, "has_gpu_kernel", lambda device: True)
    product = lambda x, weight, scale: calls.append(len(x)) or x.new_zeros(len(x), 5)
    monkeypatch.setattr(quantised, "int8_linear", product)
    quantised._messages.clear()
    layer = round_int8(torch.randn(5, 32))
    with caplog.at_level(logging.INFO, "plumbing.quantised"):
        shapes = [layer(torch.randn(*size, 32)).shape for size in ((2, 1), (4, 64), (1, 257))]
    assert shapes == [(2, 1, 5), (4, 64, 5), (1, 257, 5)] and calls == [2, 256]
    assert ["Triton" in message for message in caplog.messages] == [True, False]


@KINDS
def test_a_layer_compiles_as_one_graph(kind):
    layer, x = quantised.KINDS[kind](linear_of(torch.randn(64, 32))), torch.randn(1, 3, 32)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))


@KINDS
def test_an_adapter_is_merged_before_weights_are_rounded(kind, tmp_path):
    libra = read(GOLDEN / "adapters" / "lora", kind, base=SEVEN)
    Libra.from_pretrained(GOLDEN / "adapters" / "lora", base=SEVEN, device="cpu").save_pretrained(tmp_path / "merged")
    same_bits(libra, read(tmp_path / "merged", kind))


def test_the_command_line_writes_8_bits_beside_the_type_of_the_checkpoint(tmp_path, capsys):
    arguments = ["--model", str(SEVEN), "--out", str(tmp_path / "out"), "--dtype", "int8"]
    assert model.main(arguments) == 0
    stored = load_file(tmp_path / "out" / "model.safetensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    name = "model.layers.0.mlp.up_proj.weight"
    assert stored[name].dtype == torch.int8 and stored[f"{name}_scale"].dtype == torch.float32
    assert config["mm_weights"] == "int8"
    assert str(stored["model.embed_tokens.weight"].dtype) == f"torch.{config['torch_dtype']}"
    assert torch.equal(decoder_logits(read(SEVEN)), decoder_logits(read(tmp_path / "out")))


def test_the_command_line_writes_4_bits_two_in_a_byte(tmp_path, capsys):
    arguments = ["--model", str(SEVEN), "--out", str(tmp_path / "out"), "--dtype", "int4"]
    assert model.main(arguments) == 0
    stored, original = load_file(tmp_path / "out" / "model.safetensors"), load("libra-7b").decoder
    name = "layers.0.mlp.up_proj.weight"
    source = original.get_parameter(name)
    weight, scale = stored[f"model.{name}"], stored[f"model.{name}_scale"]
    assert weight.dtype == torch.uint8 and weight.shape == (len(source), source.shape[1] // 2)
    assert scale.dtype == torch.bfloat16 and scale.shape == (len(source), source.shape[1] // 32, 2)
    numbers = torch.stack((weight % 16, weight // 16), -1).flatten(1).float()
    scale, zero = scale.repeat_interleave(32, 1).float().unbind(-1)
    assert relative((numbers - 8) * scale + zero, source) < 0.1
    assert stored["lm_head.weight"].dtype == torch.int8
    assert json.loads((tmp_path / "out" / "config.json").read_text())["mm_weights"] == "int4"


def test_columns_that_are_no_multiple_of_32_have_8_bits_and_a_line_says_so(caplog):
    module = torch.nn.ModuleDict({"odd": torch.nn.Linear(48, 64), "even": torch.nn.Linear(64, 64)})
    quantised._messages.clear()
    with caplog.at_level(logging.INFO, "plumbing.quantised"):
        quantised.quantise_linears(module, "int4")
    assert quantised.kind_of(module["odd"]) == "int8" and quantised.kind_of(module["even"]) == "int4"
    assert caplog.messages == ["int4: layers of 48 columns, no multiple of 32, have 8 bits"]


@pytest.fixture
def saved(tmp_path):
    read(SEVEN).save_pretrained(tmp_path / "int8")
    return tmp_path / "int8"


def test_another_dtype_is_refused(saved):
    with pytest.raises(ValueError, match="int8 weights, which do not become float32 again"):
        read(saved, dtype="float32")
    with pytest.raises(ValueError, match="int8 weights, which do not become int4 again"):
        read(saved, "int4")


def test_training_adapters_and_stock_files_are_refused(saved, capsys, tmp_path):
    config = train.TrainConfig(model=str(saved), out_dir=str(tmp_path / "run"))
    with pytest.raises(ValueError, match="int8 weights, which do not train"):
        train.build(config)
    with pytest.raises(ValueError, match="which take no adapter"):
        read(GOLDEN / "adapters" / "lora", base=saved)
    with pytest.raises(ValueError, match="other programs do not know"):
        read(saved).save_parts(tmp_path / "parts")


def test_whole_numbers_without_our_field_are_refused_by_name(saved):
    change(saved / "config.json", mm_weights=None)
    with pytest.raises(ValueError, match=r"not floating-point: decoder\.layers\.0"):
        read(saved)


def test_a_damaged_weight_or_scale_is_refused_by_name(saved, tmp_path):
    file = saved / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(tensors | {f"{name}_scale": tensors[f"{name}_scale"] * torch.nan}, file)
    with pytest.raises(ValueError, match=r"up_proj\.weight_scale holds NaN"):
        read(saved)
    save_file(tensors | {name: tensors[name].float()}, file)
    with pytest.raises(ValueError, match="1 not int8"):
        read(saved)
    load("libra-7b").save_pretrained(tmp_path / "float")
    file = tmp_path / "float" / "model.safetensors"
    tensors = load_file(file)
    tensors[name][0, 0] = torch.nan
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"up_proj\.weight holds NaN"):
        read(tmp_path / "float")
