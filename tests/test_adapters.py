"""The oracles: golden logits, and `transformers` and `peft`, which read what we write and write what we read."""

import dataclasses
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
from conftest import FAMILIES, GOLDEN, ROOT, change, last_logits, load, read_again, relative, same_weights, study_of
from safetensors.torch import load_file, save_file

from lora import LoRAConfig, LoRALinear, lora_parameters
from model import Libra
from plumbing import checkpoint
from plumbing.layout import ADAPTER_NEUTRAL, ADAPTER_REFUSED, ADAPTER_VALUES, CONNECTOR_FILES, write_language_model
from sample import generate, prefill, prompt_of

ADAPTERS, SEVEN, ENCODER = GOLDEN / "adapters", GOLDEN / "libra-7b" / "model", GOLDEN / "libra-7b" / "encoder-dinov2"
EXPECTED = load_file(ADAPTERS / "expected.safetensors")
STUDY = study_of(json.loads((ADAPTERS / "expected.json").read_text()))
GIVEN = {  # --model and --base -> the golden logits
    "projector": (ADAPTERS / "projector", SEVEN, "projector_logits"),
    "projector file": (ADAPTERS / "projector" / "mm_projector.bin", SEVEN, "projector_logits"),
    "lora": (ADAPTERS / "lora", None, "lora_logits"),
    "lora, base named": (ADAPTERS / "lora", SEVEN, "lora_logits"),
    "lora and connector": (ADAPTERS / "lora-connector", None, "lora_connector_logits"),
}


def stored_names(folder):
    return checkpoint.list_tensors(checkpoint.locate(folder)).keys()


def decoder_logits(libra, ids):
    """ids [1, T] -> logits [1, T, V] of the decoder, with the whole vocabulary."""
    hidden = libra.decoder(libra.decoder.embed_tokens(ids), torch.arange(ids.shape[1])[None])
    return libra.decoder.head(hidden, libra.decoder.config.vocab_size)


@torch.no_grad()
def same_logits(libra, theirs):
    """Our decoder computes what a model of `transformers` or `peft` does."""
    ids = torch.randint(3, 590, (1, 21), generator=torch.Generator().manual_seed(0))
    assert relative(decoder_logits(libra, ids), theirs.eval()(ids).logits) < 1e-5


def seven_in_transformers():
    fields = json.loads((SEVEN / "config.json").read_text()) | {"model_type": "llama"}
    return transformers.LlamaForCausalLM.from_pretrained(SEVEN, config=transformers.LlamaConfig(**fields))


def randomise_lora(named_parameters):
    torch.manual_seed(0)
    for name, parameter in named_parameters:
        if ".lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)


def add_random_lora(libra, *config):
    libra.add_lora(LoRAConfig(*config))
    randomise_lora(lora_parameters(libra.decoder).items())


# ------------------------------------------------------------------------------------------------ golden


@pytest.mark.parametrize("name", GIVEN)
@pytest.mark.parametrize("merge", [True, False])
def test_golden_logits_merged_and_unmerged(name, merge):
    source, base, key = GIVEN[name]
    libra = read_again(source, base=base, merge=merge)
    assert relative(last_logits(libra, STUDY), EXPECTED[key]) < 1e-4
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
    assert relative(last_logits(libra, STUDY), EXPECTED["lora_logits"]) < 0.05


# ------------------------------------------------------------------------------------------- what we write


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_decoder_generates_in_transformers_what_ours_does(tmp_path, family):
    """The oracle: greedy `generate` of the class that config.json names, given our embeddings of image and prompt."""
    libra, study = load(family), study_of(json.loads((GOLDEN / family / "case0" / "expected.json").read_text()))
    write_language_model(libra, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [type(theirs).__name__]
    prompt, pixels = prompt_of(libra, study.query), libra.preprocess(study.images())
    with torch.inference_mode():
        embeddings = libra.splice(prompt.ids, libra.embed_images(pixels))  # [T, hidden]
        # since version 5 `transformers` scales a Gemma's embeddings where it looks them up, not behind that
        if libra.decoder.config.scaled_embeddings:
            embeddings = embeddings * libra.decoder.config.hidden_size**0.5
        ids = theirs.eval().generate(inputs_embeds=embeddings[None], do_sample=False, max_new_tokens=24)[0].tolist()
    assert ids == generate(libra, study, max_new_tokens=24)[0].token_ids


def test_the_config_of_a_saved_decoder_describes_what_was_saved(tmp_path):
    """Not the type of the weights that were read, and no Python files that are not there."""
    shutil.copytree(GOLDEN / "libra-7b", tmp_path / "libra")
    change(tmp_path / "libra" / "model" / "config.json", dtype="float32", auto_map={"AutoModel": "modeling.Model"})
    libra = Libra.from_pretrained(tmp_path / "libra" / "model", device="cpu", dtype="bfloat16")
    libra.save_parts(tmp_path / "parts")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "parts" / "decoder")
    assert theirs.dtype == torch.bfloat16
    assert "auto_map" not in json.loads((tmp_path / "parts" / "decoder" / "config.json").read_text())


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
    original = stored_names(GOLDEN / family / "model")
    unused = {name for name in original if name.endswith(("mask_token", "layernorm.weight", "layernorm.bias"))}
    assert stored_names(tmp_path / "a" / "saved") >= original - unused


CLASSES = {"libra": "Llama", "libra_mistral": "Mistral", "libra_qwen2": "Qwen2", "libra_qwen3": "Qwen3",
           "libra_phi3": "Phi3", "libra_gemma": "Gemma"}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_the_decoder_of_a_saved_checkpoint_loads_in_transformers_with_the_same_logits(tmp_path, family):
    libra = load(family)
    libra.save_pretrained(tmp_path / "saved")
    fields = json.loads((tmp_path / "saved" / "config.json").read_text())
    name = CLASSES[fields.pop("model_type")]
    config = getattr(transformers, f"{name}Config")(**fields)
    theirs = getattr(transformers, f"{name}ForCausalLM").from_pretrained(tmp_path / "saved", config=config)
    same_logits(libra, theirs)


def test_biases_of_the_decoder_are_kept_through_lora_merging_and_writing(tmp_path):
    """The oracle: `transformers`, which reads the merged checkpoint as a Llama."""
    save_stock("Llama", tmp_path / "stock", attention_bias=True, mlp_bias=True)
    libra = Libra.from_parts(tmp_path / "stock", ENCODER, device="cpu")
    add_random_lora(libra, 3, 6.0, ("q_proj", "o_proj", "down_proj"))
    libra.save_pretrained(tmp_path / "merged")
    merged = read_again(tmp_path / "merged")
    assert relative(last_logits(merged, STUDY), last_logits(libra, STUDY)) < 1e-5
    change(tmp_path / "merged" / "config.json", model_type="llama")
    same_logits(merged, transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged", dtype="float32"))


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
    assert not any("vision_tower" in name for name in stored_names(tmp_path / "stock"))
    libra = read_again(SEVEN, changes={"unfreeze_mm_vision_tower": True})
    with torch.no_grad():
        libra.encoder.layers[3].fc1.bias += 1
    libra.save_pretrained(tmp_path / "trained")
    same_weights(read_again(tmp_path / "trained"), libra)
    # or as a stock one beside the checkpoint, and not twice
    libra.save_pretrained(tmp_path / "beside", with_encoder=True)
    assert not any("vision_tower" in name for name in stored_names(tmp_path / "beside"))
    same_weights(read_again(tmp_path / "beside"), libra)


def test_an_encoder_that_was_trained_beside_lora_outlives_the_merge(tmp_path):
    libra = read_again(ADAPTERS / "lora-connector", merge=False, changes={"unfreeze_mm_vision_tower": True})
    with torch.no_grad():
        libra.encoder.layers[3].fc1.bias += 1
    libra.save_adapter(tmp_path / "adapter")
    merged = read_again(tmp_path / "adapter")
    merged.save_pretrained(tmp_path / "merged")
    merged.save_pretrained(tmp_path / "beside", with_encoder=True)
    logits = last_logits(libra, STUDY)
    for folder in ("adapter", "merged", "beside"):
        assert relative(last_logits(read_again(tmp_path / folder), STUDY), logits) < 1e-4
    # what was merged can be trained and saved again
    read_again(tmp_path / "merged").save_pretrained(tmp_path / "again")
    assert stored_names(tmp_path / "again") == stored_names(tmp_path / "merged")


@pytest.mark.parametrize("name", ["lora", "lora-connector"])
def test_an_adapter_reads_back_and_loads_in_peft(tmp_path, name):
    libra = read_again(ADAPTERS / name, merge=False)
    libra.save_adapter(tmp_path / "adapter")
    golden = EXPECTED[f"{name.replace('-', '_')}_logits"]
    assert relative(last_logits(read_again(tmp_path / "adapter"), STUDY), golden) < 1e-4
    written = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    published = load_file(ADAPTERS / name / "adapter_model.safetensors")
    assert written.keys() == published.keys()
    assert all(torch.equal(written[key], published[key]) for key in published)
    same_logits(libra, peft.PeftModel.from_pretrained(seven_in_transformers(), tmp_path / "adapter"))


TARGETS = ["q_proj", "up_proj"]
WRITTEN_BY_PEFT = {  # fields of peft.LoraConfig, beside r 3 and lora_alpha 5
    "plain names": dict(target_modules=TARGETS, use_rslora=True),
    "dotted names": dict(target_modules=["self_attn.q_proj", "1.mlp.up_proj"]),
    "whole names": dict(target_modules=["model.layers.0.self_attn.v_proj", "model.layers.2.mlp.down_proj"]),
    "a name that no module has": dict(target_modules=["q_proj", "query_key_value"]),
    "a regular expression": dict(target_modules=r".*layers\.[02]\.(self_attn\.[qk]|mlp\.up)_proj"),
    "all linear layers": dict(target_modules="all-linear"),
    "all but some": dict(target_modules=TARGETS, exclude_modules=["0.self_attn.q_proj", "layers.1.mlp.up_proj"]),
    "all but a pattern": dict(target_modules=TARGETS, exclude_modules=r".*\.[12]\.mlp\..*"),
    "one layer": dict(target_modules=TARGETS, layers_to_transform=0),
    "some layers": dict(target_modules=[*TARGETS, "model.layers.1.mlp.gate_proj"], layers_to_transform=[0, 2]),
    "some layers of a list": dict(target_modules=TARGETS, layers_to_transform=[1], layers_pattern=["h", "layers"]),
    "no layers of a list": dict(target_modules=["q_proj", "model.layers.1.mlp.gate_proj"], layers_to_transform=[0],
                                layers_pattern="h"),
    "ranks": dict(target_modules=TARGETS, rank_pattern={"q_proj": 2, r"layers\.[12]\.mlp\.up_proj": 1}),
    "factors": dict(target_modules=TARGETS, alpha_pattern={"1.mlp.up_proj": 11, "up_proj": 2.5, "q": 9}),
    "both, rank-stabilised": dict(
        target_modules=TARGETS, rank_pattern={"up_proj": 2}, alpha_pattern={"^model.layers.0.+": 7}, use_rslora=True
    ),
    "weights of another kind": dict(target_modules=TARGETS, fan_in_fan_out=True),
    **{f"{init} at first": dict(target_modules=TARGETS, init_lora_weights=init, r=4) for init in
       (False, "gaussian", "orthogonal", "mica")},
}  # fmt: skip


@pytest.mark.parametrize("name", WRITTEN_BY_PEFT)
def test_an_adapter_written_by_peft_is_read_merged_and_written_again(tmp_path, name):
    fields = dict(r=3, lora_alpha=5, task_type="CAUSAL_LM") | WRITTEN_BY_PEFT[name]
    theirs = peft.get_peft_model(seven_in_transformers(), peft.LoraConfig(**fields))
    randomise_lora(theirs.named_parameters())
    theirs.save_pretrained(tmp_path / "theirs")
    libra = read_again(tmp_path / "theirs", base=SEVEN, merge=False)
    same_logits(libra, theirs)
    same_logits(read_again(tmp_path / "theirs", base=SEVEN), theirs)
    libra.save_adapter(tmp_path / "ours")
    same_logits(libra, peft.PeftModel.from_pretrained(seven_in_transformers(), tmp_path / "ours"))
    libra.save_pretrained(tmp_path / "merged")
    same_logits(read_again(tmp_path / "merged"), theirs)


@pytest.fixture
def phi3(tmp_path):
    """A small Libra over a random Phi-3, read from the disk."""
    save_stock("Phi3", tmp_path / "stock")
    torch.manual_seed(0)
    Libra.from_parts(tmp_path / "stock", ENCODER, device="cpu").save_pretrained(tmp_path / "base")
    return read_again(tmp_path / "base")


def test_an_adapter_of_a_fused_family_is_fused_on_disk(phi3, tmp_path):
    """qkv_proj and gate_up_proj have one first matrix each, which their parts share."""
    add_random_lora(phi3, 3, 6.0, ("down_proj", "gate_up_proj", "o_proj", "qkv_proj"))
    phi3.save_adapter(tmp_path / "adapter")
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    modules = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    expected = {f"{module}.lora_{matrix}.weight" for module in modules for matrix in "AB"}
    assert {name.split(".layers.0.")[1] for name in names if ".layers.0." in name} == expected
    same_weights(read_again(tmp_path / "adapter", merge=False), phi3)


def test_a_fused_family_is_merged_on_reading_and_on_writing(phi3, tmp_path):
    add_random_lora(phi3, 3, 6.0, ("o_proj", "qkv_proj"))
    phi3.save_adapter(tmp_path / "adapter")
    merged = read_again(tmp_path / "adapter")
    assert relative(last_logits(merged, STUDY), last_logits(phi3, STUDY)) < 1e-5
    for name, libra in (("merged", merged), ("unmerged", phi3)):
        libra.save_pretrained(tmp_path / name)
        assert any(name.endswith("qkv_proj.weight") for name in stored_names(tmp_path / name))
        same_weights(read_again(tmp_path / name), merged)


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


def test_an_adapter_over_an_adapter_is_put_onto_the_merged_one(tmp_path):
    libra = read_again(ADAPTERS / "lora-connector")
    add_random_lora(libra, 2, 4.0, ("o_proj",))
    libra.save_adapter(tmp_path / "above")
    assert relative(last_logits(read_again(tmp_path / "above"), STUDY), last_logits(libra, STUDY)) < 1e-5


# ------------------------------------------------------------------------------------------- stock parts


def save_stock(name, folder, **changes):
    """A random stock language model with a tokenizer, as a hub repository holds it."""
    sizes = dict(vocab_size=700, hidden_size=48, intermediate_size=72, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=0)  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**sizes | changes))
    for parameter, weight in model.named_parameters():
        if parameter.endswith("bias"):
            torch.nn.init.normal_(weight)
    model.save_pretrained(folder)
    for file in ("tokenizer.model", "tokenizer_config.json", "added_tokens.json"):
        shutil.copy(SEVEN / file, folder)


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Qwen2", "Qwen3", "Phi3", "Gemma"])
@pytest.mark.parametrize("connector", ["TAC", "linear", "mlp3x_gelu", "mlp2x_gelu_pair"])
def test_a_new_model_from_stock_parts_saves_and_reads_back(tmp_path, name, connector):
    save_stock(name, tmp_path / "stock")
    torch.manual_seed(7)
    libra = Libra.from_parts(tmp_path / "stock", ENCODER, connector, device="cpu")
    libra.save_pretrained(tmp_path / "model")
    again = read_again(tmp_path / "model")
    same_weights(again, libra)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["model_type"] == ("libra" if name == "Llama" else f"libra_{name.lower()}")
    assert config["mm_hidden_size"] == 48 and config["mm_projector_type"] == connector and config["use_mm_proj"]
    assert config["mm_vision_select_layer"] == ("all" if connector == "TAC" else -2)
    assert again.template == libra.template and again.pixels.pad == "black"
    assert torch.equal(last_logits(again, STUDY), last_logits(libra, STUDY))
    libra.save_connector(tmp_path / "connector")  # stage 1's result: over the stock decoder
    assert "base_model_name_or_path" in json.loads((tmp_path / "connector" / "config.json").read_text())
    same_weights(read_again(tmp_path / "connector"), libra)


def test_a_fresh_connector_starts_as_torch_s_modules_do():
    torch.manual_seed(3)
    libra = Libra.from_parts(SEVEN, ENCODER, device="cpu")
    for name, theirs in torch.nn.MultiheadAttention(48, 4, add_bias_kv=True).named_parameters():
        ours = libra.connector.cur_self_attention.get_parameter(name)
        assert ours.shape == theirs.shape and abs(ours.std() - theirs.std()) <= 0.3 * theirs.std(), name
    assert libra.connector.LFE_prior_bias == 0 and not libra.training


@pytest.fixture
def copy(tmp_path):
    """The 7b checkpoint and the adapter over it, in a place where a test can spoil them."""
    for name, source in (("model", SEVEN), ("encoder-dinov2", ENCODER), ("lora", ADAPTERS / "lora")):
        shutil.copytree(source, tmp_path / name)
    change(tmp_path / "lora" / "adapter_config.json", base_model_name_or_path="../model")
    change(tmp_path / "lora" / "config.json", mm_vision_tower=str(ENCODER))
    return tmp_path


def test_the_image_can_be_between_marks_of_its_own(copy):
    """The marks get the ids behind the vocabulary, for which the embeddings must have rows."""
    change(copy / "model" / "config.json", mm_use_im_start_end=True)
    refused(str(copy / "model"), copy / "model")
    libra = load("libra-7b")
    table, head = libra.decoder.embed_tokens.weight, libra.decoder.lm_head.weight
    grown = {"model.embed_tokens.weight": torch.cat((table, table[:2])), "lm_head.weight": torch.cat((head, head[:2]))}
    weights = {}
    for shard in SEVEN.glob("*.safetensors"):
        weights |= load_file(shard)
    (copy / "model" / "model.safetensors.index.json").unlink()
    save_file(weights | grown, copy / "model" / "model.safetensors")
    change(copy / "model" / "config.json", vocab_size=702)
    libra = read_again(copy / "model")
    (prompt,) = prefill(libra, [STUDY]).prompts
    at = prompt.ids.index(-200)
    assert (prompt.ids[at - 1], prompt.ids[at + 1], libra.vocabulary) == (700, 701, 702)
    assert "<im_start><image><im_end>\n" in prompt.text


# ---------------------------------------------------------------------------------------------- mistakes


def refused(culprit, source, **options):
    """Reading fails with one line that names the culprit."""
    with pytest.raises((ValueError, OSError)) as caught:
        read_again(source, **options)
    assert "\n" not in str(caught.value) and culprit in str(caught.value), caught.value


@pytest.mark.parametrize(
    ("fields", "culprit"),
    [
        (dict(peft_type="IA3"), "peft_type"), (dict(use_dora=True), "use_dora"), (dict(bias="all"), "bias"),
        (dict(init_lora_weights="pissa_niter_4"), "init_lora_weights"), (dict(init_lora_weights="olora"), "olora"),
        (dict(modules_to_save=["lm_head"]), "modules_to_save"), (dict(alora_invocation_tokens=[5]), "alora_invoc"),
        (dict(next_years_field="on"), "next_years_field"),
        (dict(rank_pattern={"q_proj": 2}), "q_proj.lora_A"), (dict(r=8), "lora_A"),
        (dict(lora_alpha=float("nan")), "lora_alpha is nan"), (dict(lora_alpha="8"), "lora_alpha is '8'"),
        (dict(r=0), "r is 0"), (dict(alpha_pattern={"q_proj": None}), "alpha_pattern"),
        (dict(target_modules=["q_proj", "k_proj"]), "up_proj"), (dict(target_modules="q_proj("), "'q_proj('"),
        (dict(target_modules=["lm_head"]), "match no module"), (dict(target_modules=7), "target_modules is 7"),
        (dict(layers_to_transform=[0]), "layers.1"),
        (dict(base_model_name_or_path=None), "--base"), (dict(base_model_name_or_path="../nowhere"), "../nowhere"),
        (dict(base_model_name_or_path="."), "itself"),
    ],
)  # fmt: skip
def test_an_unsupported_adapter_is_refused_by_name(copy, fields, culprit):
    change(copy / "lora" / "adapter_config.json", **fields)
    refused(culprit, copy / "lora")


def test_every_field_of_peft_s_config_is_computed_neutral_or_refused():
    """The oracle is the installed peft; a field of its next version must be looked at here."""
    computed = {field.name for field in dataclasses.fields(LoRAConfig)}
    listed = [*computed, *ADAPTER_VALUES, *ADAPTER_REFUSED, *ADAPTER_NEUTRAL]
    assert len(listed) == len(set(listed))
    assert {field.name for field in dataclasses.fields(peft.LoraConfig)} <= set(listed)


def test_tensors_beside_other_modules_are_refused_by_name(copy):
    file = copy / "lora" / "adapter_model.safetensors"
    name = "base_model.model.lm_head.lora_A.weight"
    save_file(load_file(file) | {name: torch.zeros(4, 64)}, file)
    refused(name, copy / "lora")


def test_an_adapter_for_another_base_is_refused(copy):
    (copy / "lora" / "config.json").unlink()  # it would not fit the base either
    refused(f"the adapter in {copy / 'lora'}", copy / "lora", base=GOLDEN / "libra-3b" / "model")


def test_an_adapter_for_a_layer_too_many_or_without_weights_is_refused(copy):
    file = copy / "lora" / "adapter_model.safetensors"
    weights = load_file(file)
    first = {name: tensor for name, tensor in weights.items() if ".layers.0." in name}
    extra = {name.replace(".layers.0.", ".layers.3."): tensor.clone() for name, tensor in first.items()}
    save_file(weights | extra, file)
    refused("14 unexpected", copy / "lora")
    file.unlink()
    refused(file.name, copy / "lora")


def test_a_base_goes_below_a_connector_and_not_below_a_whole_checkpoint():
    refused("mm_projector.bin", ADAPTERS / "projector")
    refused("--base", SEVEN, base=SEVEN)


def test_a_checkpoint_that_lacks_a_shard_is_no_connector(copy):
    shutil.copy(ADAPTERS / "projector" / "mm_projector.bin", copy / "model" / "mm_tac_projector.bin")
    shard = sorted((copy / "model").glob("model-*.safetensors"))[1]
    shard.unlink()
    refused(shard.name, copy / "model")


def test_a_connector_of_another_type_is_refused(tmp_path):
    torch.save({"model.mm_projector.projector.0.weight": torch.ones(64, 48)}, tmp_path / "mm_projector.bin")
    refused("mm_projector.bin", tmp_path / "mm_projector.bin", base=SEVEN)


def test_tac_heads_that_do_not_divide_the_width_are_refused(tmp_path):
    save_stock("Llama", tmp_path / "stock")
    change(tmp_path / "stock" / "config.json", num_attention_heads=5, num_key_value_heads=5, head_dim=12)
    with pytest.raises(ValueError, match="5 heads"):
        Libra.from_parts(tmp_path / "stock", ENCODER, device="cpu")


# ----------------------------------------------------------------------------------------- command line


def convert(*arguments, **options):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "model.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, **options)


def test_a_checkpoint_can_contain_its_encoder(tmp_path):
    done = convert("--model", SEVEN, "--with-encoder", "--out", tmp_path / "a" / "whole")
    assert done.returncode == 0 and not done.stderr, done.stderr
    (tmp_path / "a").rename(tmp_path / "b")  # nothing outside the folder is named
    same_weights(read_again(tmp_path / "b" / "whole"), load("libra-7b"))


def test_the_command_line_merges_and_a_failing_write_leaves_the_old_checkpoint(tmp_path):
    done = convert("--model", ADAPTERS / "lora-connector", "--out", tmp_path / "merged")
    assert done.returncode == 0 and not done.stderr, done.stderr
    small_disk = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    failed = convert("--model", SEVEN, "--out", tmp_path / "merged", preexec_fn=small_disk)
    assert failed.returncode == 2 and failed.stderr.count("\n") == 1 and "merged" in failed.stderr, failed.stderr
    assert relative(last_logits(read_again(tmp_path / "merged"), STUDY), EXPECTED["lora_connector_logits"]) < 1e-4
