"""Adapters, connectors, new models from stock parts, and what is saved."""

import json
import os
import resource
import shutil
import subprocess
import sys

import peft
import pytest
import torch
import transformers
from conftest import FAMILIES, GOLDEN, ROOT, load, read, relative, study_of
from safetensors.torch import load_file, save_file

from decoder import names_of
from lora import LoRAConfig, LoRALinear, add_lora, lora_parameters
from model import Libra
from plumbing import checkpoint
from plumbing.layout import CONNECTOR_FILES
from sample import generate, prefill
from tokenizer import TEMPLATES, render

ADAPTERS, SEVEN = GOLDEN / "adapters", GOLDEN / "libra-7b" / "model"
EXPECTED = load_file(ADAPTERS / "expected.safetensors")
STUDY = study_of(dict(read("adapters", "expected.json")))
GIVEN = {  # --model and --base -> the golden logits
    "projector": (ADAPTERS / "projector", SEVEN, "projector_logits"),
    "projector file": (ADAPTERS / "projector" / "mm_projector.bin", SEVEN, "projector_logits"),
    "lora": (ADAPTERS / "lora", None, "lora_logits"),
    "lora, base named": (ADAPTERS / "lora", SEVEN, "lora_logits"),
    "lora and connector": (ADAPTERS / "lora-connector", None, "lora_connector_logits"),
}
given = pytest.mark.parametrize("name", GIVEN)


def read_again(source, **options):
    return Libra.from_pretrained(source, **dict(device="cpu", dtype="float32") | options)


@torch.no_grad()
def last_logits(libra, study=STUDY):
    prompt = render([(f"{libra.image_text}\n{study.query}", None)], TEMPLATES[libra.template], libra.tokenizer)
    embeddings = libra.splice(prompt.ids, libra.embed_images(libra.preprocess(study.images())))
    return libra.logits(libra.decoder(embeddings[None], torch.arange(len(embeddings))[None])[0, -1])


def same_weights(one, other):
    one, other = dict(one.named_parameters()), dict(other.named_parameters())
    assert one.keys() == other.keys()
    for name, parameter in one.items():
        assert parameter.dtype == other[name].dtype and torch.equal(parameter, other[name]), name


def refused(words, *arguments, **options):
    with pytest.raises((ValueError, OSError)) as caught:
        read_again(*arguments, **options)
    assert "\n" not in str(caught.value) and words in str(caught.value), caught.value


# ------------------------------------------------------------------------------------------------ golden


@given
@pytest.mark.parametrize("merge", [True, False])
def test_golden_logits_merged_and_unmerged(name, merge):
    source, base, key = GIVEN[name]
    libra = read_again(source, base=base, merge=merge)
    assert relative(last_logits(libra), EXPECTED[key]) < 1e-4
    lora = [module for module in libra.modules() if isinstance(module, LoRALinear)]
    assert len(lora) == (0 if merge or "lora" not in name else 3 * 7)
    assert (libra.lora is None) == (not lora) and not any(p.requires_grad for p in libra.parameters())


@pytest.mark.parametrize("name", ["lora", "lora-connector"])
def test_merged_and_unmerged_give_the_same_ids(name):
    merged, unmerged = (read_again(ADAPTERS / name, merge=merge) for merge in (True, False))
    for options in (dict(), dict(num_beams=3, length_penalty=2.0)):
        outputs = [generate(libra, STUDY, max_new_tokens=16, **options)[0] for libra in (merged, unmerged)]
        assert outputs[0].token_ids == outputs[1].token_ids


def test_an_adapter_in_16_bits_runs_unmerged():
    libra = read_again(ADAPTERS / "lora", merge=False, dtype="bfloat16")
    assert relative(last_logits(libra), EXPECTED["lora_logits"]) < 0.05


# ------------------------------------------------------------------------------------------- what we write


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shard_size", [5 * 10**9, 200_000])
def test_a_saved_checkpoint_reads_back_bit_for_bit(tmp_path, family, shard_size):
    libra = load(family)
    libra.save_pretrained(tmp_path / "a" / "saved", shard_size=shard_size)
    sharded = len(list((tmp_path / "a" / "saved").glob("*.safetensors"))) > 1
    assert sharded == (shard_size < 10**9)
    again = read_again(tmp_path / "a" / "saved")
    same_weights(again, libra)
    assert (again.template, again.eos_token_ids, again.vocabulary, again.pixels) == (
        libra.template, libra.eos_token_ids, libra.vocabulary, libra.pixels
    )  # fmt: skip
    original = set(load_names(GOLDEN / family / "model"))
    dropped = {name for name in original if name.endswith(("mask_token", "layernorm.weight", "layernorm.bias"))}
    assert set(load_names(tmp_path / "a" / "saved")) >= original - dropped


def load_names(folder):
    return checkpoint.list_tensors(checkpoint.locate(folder))


CLASSES = {"libra": "Llama", "libra_mistral": "Mistral", "libra_qwen2": "Qwen2", "libra_qwen3": "Qwen3",
           "libra_phi3": "Phi3", "libra_gemma": "Gemma"}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_the_decoder_of_a_saved_checkpoint_loads_in_transformers_with_the_same_logits(tmp_path, family):
    libra = load(family)
    libra.save_pretrained(tmp_path / "saved")
    fields = json.loads((tmp_path / "saved" / "config.json").read_text())
    name = CLASSES[fields.pop("model_type")]
    config = getattr(transformers, f"{name}Config")(**fields)
    theirs = getattr(transformers, f"{name}ForCausalLM").from_pretrained(tmp_path / "saved", config=config).eval()
    ids = torch.randint(3, 590, (1, 21), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden = libra.decoder(libra.decoder.embed_tokens(ids), torch.arange(21)[None])
        ours = libra.decoder.head(hidden, libra.decoder.config.vocab_size)
        assert relative(ours, theirs(ids).logits) < 1e-5


def test_a_checkpoint_can_be_converted_and_moves_as_one_with_its_encoder(tmp_path):
    for part in ("model", "encoder-dinov2"):
        shutil.copytree(GOLDEN / "libra-3b" / part, tmp_path / "one" / part)
    libra = read_again(tmp_path / "one" / "model", dtype="bfloat16")
    libra.save_pretrained(tmp_path / "one" / "half")
    shutil.move(tmp_path / "one", tmp_path / "two")
    again = read_again(tmp_path / "two" / "half", dtype="stored")
    assert again.dtype == torch.bfloat16
    same_weights(again, libra)


def test_an_encoder_is_written_where_it_was_trained(tmp_path):
    libra = read_again(SEVEN)
    libra.save_pretrained(tmp_path / "stock")
    assert not any("vision_tower" in name for name in load_names(tmp_path / "stock"))
    libra = read_again(SEVEN, changes={"unfreeze_mm_vision_tower": True})
    with torch.no_grad():
        libra.encoder.layers[3].fc1.bias += 1
    libra.save_pretrained(tmp_path / "trained")
    same_weights(read_again(tmp_path / "trained"), libra)


@pytest.mark.parametrize("name", ["lora", "lora-connector"])
def test_an_adapter_reads_back_and_loads_in_peft(tmp_path, name):
    libra = read_again(ADAPTERS / name, merge=False)
    libra.save_adapter(tmp_path / "adapter")
    assert relative(last_logits(read_again(tmp_path / "adapter")), EXPECTED[f"{name.replace('-', '_')}_logits"]) < 1e-4
    folders = (tmp_path / "adapter", ADAPTERS / name)
    written, golden = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    assert written.keys() == golden.keys()
    assert all(torch.equal(written[key], golden[key]) for key in golden)
    fields = json.loads((SEVEN / "config.json").read_text()) | {"model_type": "llama"}
    base = transformers.LlamaForCausalLM.from_pretrained(SEVEN, config=transformers.LlamaConfig(**fields))
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    ids = torch.randint(3, 690, (1, 21), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden = libra.decoder(libra.decoder.embed_tokens(ids), torch.arange(21)[None])
        assert relative(libra.decoder.head(hidden, 700), theirs(ids).logits) < 1e-5


def test_an_adapter_written_by_peft_is_read(tmp_path):
    fields = json.loads((SEVEN / "config.json").read_text()) | {"model_type": "llama"}
    base = transformers.LlamaForCausalLM.from_pretrained(SEVEN, config=transformers.LlamaConfig(**fields))
    settings = dict(r=3, lora_alpha=5, target_modules=["q_proj", "up_proj"], use_rslora=True)
    theirs = peft.get_peft_model(base, peft.LoraConfig(**settings, task_type="CAUSAL_LM")).eval()
    torch.manual_seed(0)
    for parameter_name, parameter in theirs.named_parameters():
        if ".lora_" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.2)
    theirs.save_pretrained(tmp_path)
    libra = read_again(tmp_path, base=SEVEN)
    ids = torch.randint(3, 690, (1, 21), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden = libra.decoder(libra.decoder.embed_tokens(ids), torch.arange(21)[None])
        assert relative(libra.decoder.head(hidden, 700), theirs(ids).logits) < 1e-5


def test_a_fused_family_s_adapter_is_fused_on_disk(tmp_path):
    """Phi-3: qkv_proj and gate_up_proj have one first matrix each, shared by their parts."""
    base = phi3(tmp_path)
    libra = read_again(base)
    libra.lora = LoRAConfig(3, 6.0, ("down_proj", "gate_up_proj", "o_proj", "qkv_proj"))
    add_lora(libra.decoder, names_of(libra.config.json), libra.lora)
    torch.manual_seed(1)
    for parameter in lora_parameters(libra.decoder).values():
        torch.nn.init.normal_(parameter, std=0.2)
    libra.save_adapter(tmp_path / "adapter")
    names = {name.split(".layers.0.")[1] for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors")
             if ".layers.0." in name}  # fmt: skip
    modules = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    assert names == {f"{module}.lora_{matrix}.weight" for module in modules for matrix in "AB"}
    again = read_again(tmp_path / "adapter", merge=False)
    same_weights(again, libra)
    merged = read_again(tmp_path / "adapter")
    assert relative(last_logits(merged), last_logits(libra)) < 1e-5
    merged.save_pretrained(tmp_path / "whole")
    assert any(name.endswith("qkv_proj.weight") for name in load_names(tmp_path / "whole"))
    same_weights(read_again(tmp_path / "whole"), merged)
    libra.save_pretrained(tmp_path / "folded")  # LoRA that stands beside its layers is merged on the way
    same_weights(read_again(tmp_path / "folded"), merged)


def phi3(folder):
    """A small Libra over a random Phi-3, in the published layout."""
    save_stock("Phi3", folder / "stock")
    torch.manual_seed(0)
    libra = Libra.from_parts(folder / "stock", GOLDEN / "libra-7b" / "encoder-dinov2", device="cpu")
    libra.save_pretrained(folder / "base")
    return folder / "base"


def test_a_connector_alone_reads_back_over_its_base_under_either_name(tmp_path):
    libra = read_again(ADAPTERS / "projector", base=SEVEN)
    libra.save_connector(tmp_path / "connector")
    same_weights(read_again(tmp_path / "connector"), libra)
    published = torch.load(ADAPTERS / "projector" / "mm_projector.bin", weights_only=True)
    for file in CONNECTOR_FILES[0], CONNECTOR_FILES[-1]:
        path = tmp_path / "connector" / file
        written = load_file(path) if file.endswith("safetensors") else torch.load(path, weights_only=True)
        assert written.keys() == published.keys()
        assert all(torch.equal(written[name], published[name]) for name in published)
        same_weights(read_again(path, base=SEVEN), libra)


def test_an_adapter_over_an_adapter(tmp_path):
    """Each stands on the one below, which is merged first."""
    libra = read_again(ADAPTERS / "lora-connector")
    libra.lora = LoRAConfig(2, 4.0, ("o_proj",))
    add_lora(libra.decoder, names_of(libra.config.json), libra.lora)
    for parameter in lora_parameters(libra.decoder).values():
        torch.nn.init.normal_(parameter, std=0.2)
    libra.save_adapter(tmp_path / "above")
    assert relative(last_logits(read_again(tmp_path / "above")), last_logits(libra)) < 1e-5


# ------------------------------------------------------------------------------------------- stock parts


def save_stock(name, folder):
    """A random stock language model with a tokenizer, as a hub repository holds it."""
    sizes = dict(vocab_size=700, hidden_size=48, intermediate_size=72, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=0)  # fmt: skip
    torch.manual_seed(0)
    getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**sizes)).save_pretrained(folder)
    for file in ("tokenizer.model", "tokenizer_config.json", "added_tokens.json"):
        shutil.copy(SEVEN / file, folder)


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Qwen2", "Qwen3", "Phi3", "Gemma"])
@pytest.mark.parametrize("connector", ["TAC", "linear", "mlp3x_gelu", "mlp2x_gelu_pair"])
def test_a_new_model_from_stock_parts_saves_and_reads_back(tmp_path, name, connector):
    save_stock(name, tmp_path / "stock")
    encoder = GOLDEN / "libra-7b" / "encoder-dinov2"
    torch.manual_seed(7)
    libra = Libra.from_parts(tmp_path / "stock", encoder, connector, device="cpu")
    libra.save_pretrained(tmp_path / "model")
    again = read_again(tmp_path / "model")
    same_weights(again, libra)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["model_type"] == ("libra" if name == "Llama" else f"libra_{name.lower()}")
    assert config["mm_hidden_size"] == 48 and config["mm_projector_type"] == connector and config["use_mm_proj"]
    assert config["mm_vision_select_layer"] == ("all" if connector == "TAC" else -2)
    assert again.template == libra.template and again.pixels.pad == "black"
    assert torch.equal(last_logits(again), last_logits(libra))
    libra.save_connector(tmp_path / "connector")  # stage 1's result: over the stock decoder
    assert "base_model_name_or_path" in json.loads((tmp_path / "connector" / "config.json").read_text())
    same_weights(read_again(tmp_path / "connector"), libra)


def test_a_fresh_connector_starts_as_torch_s_modules_do():
    torch.manual_seed(3)
    libra = Libra.from_parts(SEVEN, GOLDEN / "libra-7b" / "encoder-dinov2", device="cpu")
    torch.manual_seed(3)
    attention = torch.nn.MultiheadAttention(48, 4, add_bias_kv=True)
    ours = libra.connector.cur_self_attention
    for name, parameter in attention.named_parameters():
        mine = ours.get_parameter(name)
        assert mine.shape == parameter.shape and abs(mine.std() - parameter.std()) <= 0.3 * parameter.std(), name
    assert libra.connector.LFE_prior_bias == 0 and not libra.training


def test_the_image_can_stand_between_marks_of_its_own(tmp_path):
    shutil.copytree(SEVEN, tmp_path / "model")
    shutil.copytree(GOLDEN / "libra-7b" / "encoder-dinov2", tmp_path / "encoder-dinov2")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"mm_use_im_start_end": True}))
    refused("no rows for", tmp_path / "model")
    weights = {}
    for name, stored in load_names(SEVEN).items():
        weights[name] = checkpoint.read_tensor(stored)
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            weights[name] = torch.cat((weights[name], torch.randn(2, weights[name].shape[1])))
    for file in [*(tmp_path / "model").glob("*.safetensors"), tmp_path / "model" / "model.safetensors.index.json"]:
        file.unlink(missing_ok=True)
    save_file(weights, tmp_path / "model" / "model.safetensors")
    changed = config | {"mm_use_im_start_end": True, "vocab_size": 702}
    (tmp_path / "model" / "config.json").write_text(json.dumps(changed))
    libra = read_again(tmp_path / "model")
    (prompt,) = prefill(libra, [STUDY]).prompts
    at = prompt.ids.index(-200)
    assert (prompt.ids[at - 1], prompt.ids[at + 1], libra.vocabulary) == (700, 701, 702)
    assert "<im_start><image><im_end>\n" in prompt.text


# ---------------------------------------------------------------------------------------------- mistakes


@pytest.fixture
def adapter(tmp_path):
    """A copy of the golden adapter that can be spoilt; its base is named by its full path."""
    shutil.copytree(ADAPTERS / "lora", tmp_path / "lora")
    spoil(tmp_path / "lora" / "adapter_config.json", base_model_name_or_path=str(SEVEN))
    spoil(tmp_path / "lora" / "config.json", mm_vision_tower=str(GOLDEN / "libra-7b" / "encoder-dinov2"))
    return tmp_path / "lora"


def spoil(file, **fields):
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_an_adapter_for_another_base_is_refused(adapter):
    (adapter / "config.json").unlink()  # or its config would not fit the base's weights, which is said as well
    refused(f"the adapter in {adapter} does not fit its base", adapter, base=GOLDEN / "libra-3b" / "model")


def test_an_adapter_or_a_connector_without_its_base_is_refused(adapter):
    refused("give it with --base", ADAPTERS / "projector")
    spoil(adapter / "adapter_config.json", base_model_name_or_path=None)
    refused("give it with --base", adapter)
    spoil(adapter / "adapter_config.json", base_model_name_or_path="../nowhere")
    refused("no model folder ../nowhere", adapter)
    spoil(adapter / "adapter_config.json", base_model_name_or_path=".")
    refused("names itself as its base", adapter)


def test_a_base_under_a_whole_checkpoint_is_refused():
    refused("is a whole checkpoint", SEVEN, base=SEVEN)


def test_a_checkpoint_that_lacks_a_shard_is_no_connector(tmp_path):
    shutil.copytree(SEVEN, tmp_path / "model")
    shutil.copy(ADAPTERS / "projector" / "mm_projector.bin", tmp_path / "model" / "mm_tac_projector.bin")
    spoil(tmp_path / "model" / "config.json", mm_vision_tower=str(GOLDEN / "libra-7b" / "encoder-dinov2"))
    sorted((tmp_path / "model").glob("model-*.safetensors"))[1].unlink()
    refused("one of 1 missing of the 5 shards", tmp_path / "model")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(r=8), "wrongly shaped"),
        (dict(target_modules=["q_proj", "k_proj"]), "names the targets"),
        (dict(use_dora=True), "use_dora True is not supported"),
        (dict(bias="all"), "bias 'all' is not supported"),
        (dict(rank_pattern={"q_proj": 2}), "rank_pattern"),
        (dict(peft_type="IA3"), "peft_type"),
    ],
)
def test_an_adapter_that_we_do_not_compute_is_refused_by_the_name_of_its_field(adapter, fields, words):
    spoil(adapter / "adapter_config.json", **fields)
    refused(words, adapter)


def test_an_adapter_without_its_weights_or_for_a_layer_too_many_is_refused(adapter):
    weights = load_file(adapter / "adapter_model.safetensors")
    first = {name: tensor for name, tensor in weights.items() if ".layers.0." in name}
    extra = {name.replace(".layers.0.", ".layers.3."): tensor.clone() for name, tensor in first.items()}
    save_file(weights | extra, adapter / "adapter_model.safetensors")
    refused("14 unexpected", adapter)
    (adapter / "adapter_model.safetensors").unlink()
    refused("holds no adapter", adapter)


def test_a_connector_of_another_type_is_refused(tmp_path):
    shutil.copytree(ADAPTERS / "projector", tmp_path / "connector")
    file = tmp_path / "connector" / "mm_projector.bin"
    torch.save({"model.mm_projector.projector.0.weight": torch.ones(64, 48)}, file)
    spoil(tmp_path / "connector" / "config.json", mm_vision_tower=str(GOLDEN / "libra-7b" / "encoder-dinov2"))
    refused("is no TAC", tmp_path / "connector", base=SEVEN)


def test_tac_heads_that_do_not_divide_the_width_are_refused(tmp_path):
    save_stock("Llama", tmp_path / "stock")
    spoil(tmp_path / "stock" / "config.json", num_attention_heads=5, num_key_value_heads=5, head_dim=12)
    with pytest.raises(ValueError, match="5 heads do not divide the encoder's width 48"):
        Libra.from_parts(tmp_path / "stock", GOLDEN / "libra-7b" / "encoder-dinov2", device="cpu")


def run(*arguments, **options):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "model.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, **options)


def test_a_checkpoint_can_hold_its_encoder(tmp_path):
    done = run("--model", SEVEN, "--with-encoder", "--out", tmp_path / "a" / "whole")
    assert done.returncode == 0 and not done.stderr, done.stderr
    (tmp_path / "a").rename(tmp_path / "b")  # nothing outside the folder is named
    assert json.loads((tmp_path / "b" / "whole" / "config.json").read_text())["mm_vision_tower"] == "encoder"
    same_weights(read_again(tmp_path / "b" / "whole"), load("libra-7b"))


def test_the_command_line_merges_converts_and_leaves_the_old_one_whole_on_a_full_disk(tmp_path):
    done = run("--model", ADAPTERS / "lora-connector", "--out", tmp_path / "merged")
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert relative(last_logits(read_again(tmp_path / "merged")), EXPECTED["lora_connector_logits"]) < 1e-4
    before = {file.name: file.read_bytes() for file in (tmp_path / "merged").iterdir()}
    small = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    full = run("--model", SEVEN, "--out", tmp_path / "merged", "--dtype", "bfloat16", preexec_fn=small)
    assert full.returncode == 2 and full.stderr.count("\n") == 1 and "is the disk full?" in full.stderr, full.stderr
    assert {file.name: file.read_bytes() for file in (tmp_path / "merged").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
    other = run("--model", SEVEN, "--out", tmp_path)
    assert other.returncode == 2 and "not a checkpoint" in other.stderr and other.stderr.count("\n") == 1
