"""The oracles: golden logits, for the same files under other names, and a folder's own config.json."""

import shutil

import pytest
import torch
from conftest import FAMILIES, GOLDEN, cases, change, last_logits, load, read_again, relative, same_weights, study_of
from safetensors.torch import load_file, save_file

from model import Libra
from plumbing.files import read_json, write_json
from plumbing.pixels import CLIP_MEAN, CLIP_STD

SEVEN = GOLDEN / "libra-7b" / "model"
STUDY = study_of(read_json(GOLDEN / "libra-7b" / "case0" / "expected.json"))


def copy_of(family, folder):
    """A golden checkpoint that a test may change; its encoder stays where it is."""
    shutil.copytree(GOLDEN / family / "model", folder)
    tower = GOLDEN / family / "model" / read_json(folder / "config.json")["mm_vision_tower"]
    change(folder / "config.json", mm_vision_tower=str(tower.resolve()))
    return folder


def refused(culprit, read, *arguments, **options):
    """Reading fails with one line that names the culprit."""
    with pytest.raises((ValueError, OSError)) as caught:
        read(*arguments, **options)
    assert "\n" not in str(caught.value) and culprit in str(caught.value), caught.value


# ------------------------------------------------------------------------------------------ whose layout it is


@pytest.mark.parametrize(
    ("family", "model_type", "template"),
    [
        ("med-cxrgen", "llava", "v1"), ("med-cxrgen", "llava_llama", "v1"),
        ("llava-med-mistral", "llava_mistral", "llava_med_v1.5_mistral_7b"),
    ],
)  # fmt: skip
def test_a_llava_is_read_and_saved_as_the_libra_that_it_equals(tmp_path, family, model_type, template):
    if family not in FAMILIES:
        pytest.skip("only the full set of golden values has a Mistral")
    folder = copy_of(family, tmp_path / "model")
    change(folder / "config.json", model_type=model_type)
    case = next(case for name, case in cases() if name == family)
    embeddings = load_file(case / "expected.safetensors")["image_embeddings"]
    for source in (folder, tmp_path / "saved"):
        libra = read_again(source)
        study = study_of(read_json(case / "expected.json"))
        assert relative(libra.embed_images(libra.preprocess(study.images())), embeddings) < 1e-4
        assert libra.template == template
        libra.template = load(family).template
        assert torch.equal(last_logits(libra, study), last_logits(load(family), study))
        libra.save_pretrained(tmp_path / "saved")
    assert read_json(tmp_path / "saved" / "config.json")["model_type"].startswith("libra")


HF = dict(text_config={"model_type": "llama"}, vision_config={"model_type": "dinov2"})


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (dict(HF, model_type="maira2", architectures=["Maira2ForConditionalGeneration"]), "X-iZhang/libra-maira-2"),
        (dict(HF, model_type="llava"), "mm_vision_tower"), (dict(HF, model_type="llava_next"), "transformers"),
        (dict(HF), "transformers"), (dict(model_type="dinov2"), "dinov2"), (dict(model_type=["llama"]), "llama"),
        ({}, "model_type"), (dict(model_type="llava_mpt"), "llava_mpt"),
        (dict(model_type="llava", image_aspect_ratio="anyres"), "image_aspect_ratio"),
        (dict(model_type="llava_mistral", mm_patch_merge_type="spatial_unpad"), "mm_patch_merge_type"),
    ],
)  # fmt: skip
def test_another_layout_is_named(tmp_path, config, words):
    shutil.copytree(SEVEN, tmp_path / "model")
    write_json(tmp_path / "model" / "config.json", config)
    refused(words, read_again, tmp_path / "model")
    refused(words, Libra.from_parts, tmp_path / "model", GOLDEN / "libra-7b" / "encoder-dinov2", device="cpu")


@pytest.mark.parametrize(
    ("packed", "words"),
    [
        (dict(quant_method="gptq", bits=4), "gptq"), (dict(quant_method="fp8"), "fp8"),
        (dict(load_in_4bit=True), "4bit"), ("awq", "awq"), ([1], "[1]"),
    ],
)  # fmt: skip
def test_packed_weights_are_refused_by_the_name_of_their_method(tmp_path, packed, words):
    folder = copy_of("libra-7b", tmp_path / "model")
    change(folder / "config.json", quantization_config=packed)
    for word in ("quantization_config", words):
        refused(word, read_again, folder)
        refused(word, Libra.from_parts, folder, GOLDEN / "libra-7b" / "encoder-dinov2", device="cpu")


# ------------------------------------------------------------------------------------------ files of tensors


def test_a_connector_file_without_a_connector_is_refused(tmp_path):
    file = tmp_path / "mm_projector.bin"
    torch.save({}, file)
    refused(str(file), read_again, file, base=SEVEN)
    options = dict(connector_weights=file, device="cpu")
    refused(str(file), Libra.from_parts, SEVEN, GOLDEN / "libra-7b" / "encoder-dinov2", **options)


def test_a_nan_in_any_part_is_refused_by_the_name_of_its_tensor(tmp_path):
    folder = copy_of("libra-3b", tmp_path / "model")
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for name in ("model.norm.weight", "model.mm_projector.norm4.bias"):
            if name in tensors:
                save_file(tensors | {name: tensors[name] * float("nan")}, file)
                refused(f"{name} holds NaN", read_again, folder)
                save_file(tensors, file)


@pytest.mark.parametrize("eos", ["2", [2, None], -1, {}, 2.0, True])
@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_end_tokens_are_ids(tmp_path, file, eos):
    folder = copy_of("libra-7b", tmp_path / "model")
    for name in ("generation_config.json", "config.json"):
        change(folder / name, eos_token_id=eos if name == file else None)
    refused("eos_token_id", read_again, folder)


@pytest.mark.parametrize("place", [5, ["a"], {}, True])
def test_the_base_of_an_adapter_is_a_text(tmp_path, place):
    shutil.copytree(GOLDEN / "adapters" / "lora", tmp_path / "lora")
    change(tmp_path / "lora" / "adapter_config.json", base_model_name_or_path=place)
    refused("base_model_name_or_path", read_again, tmp_path / "lora")


def test_an_adapter_for_another_revision_of_its_base_is_refused(tmp_path):
    shutil.copytree(GOLDEN / "adapters" / "lora", tmp_path / "lora")
    change(tmp_path / "lora" / "adapter_config.json", revision="v2", base_model_name_or_path=str(SEVEN))
    change(tmp_path / "lora" / "config.json", mm_vision_tower=str(GOLDEN / "libra-7b" / "encoder-dinov2"))
    refused("revision 'v2'", read_again, tmp_path / "lora")
    read_again(tmp_path / "lora", base=SEVEN)


# ------------------------------------------------------------------------------------------ open_clip encoders


def timm_vit() -> dict[str, torch.Tensor]:
    """Random weights of a timm ViT of two blocks inside open_clip: width 64, patches of 8, images of 16 pixels."""
    shapes = {"cls_token": (1, 1, 64), "pos_embed": (1, 5, 64), "patch_embed.proj.weight": (64, 3, 8, 8),
              "patch_embed.proj.bias": (64,), "norm.weight": (64,), "norm.bias": (64,)}  # fmt: skip
    for block in ("blocks.0", "blocks.1"):
        layers = {"attn.qkv": (192, 64), "attn.proj": (64, 64), "mlp.fc1": (96, 64), "mlp.fc2": (64, 96)}
        for name, shape in (layers | {"norm1": (64,), "norm2": (64,)}).items():
            shapes |= {f"{block}.{name}.weight": shape, f"{block}.{name}.bias": shape[:1]}
    torch.manual_seed(0)
    weights = {f"visual.trunk.{name}": torch.randn(shape) / 8 for name, shape in shapes.items()}
    text_tower = {"text.transformer.embeddings.position_ids": torch.arange(9), "logit_scale": torch.tensor(4.6)}
    return weights | text_tower | {"visual.head.proj.weight": torch.ones(32, 64)}


def hub_layout(folder, weights, size=16):
    """An open_clip encoder as the repository of BiomedCLIP lays it out."""
    folder.mkdir()
    torch.save(weights, folder / "open_clip_pytorch_model.bin")
    pixels = {"mean": CLIP_MEAN, "std": CLIP_STD, "size": [size, size]}
    model = {"embed_dim": 32, "vision_cfg": {"timm_model_name": "vit_base_patch16_224", "timm_proj": "linear"}}
    write_json(folder / "open_clip_config.json", {"model_cfg": model, "preprocess_cfg": pixels})
    return folder


def trainer_layout(folder, weights, size=16):
    """The same as the trainer of BiomedCLIP-CXR saves it."""
    folder.mkdir()
    weights = {f"module.{name}": tensor for name, tensor in weights.items()}
    torch.save({"epoch": 3, "state_dict": weights}, folder / "tiny_checkpoint.pt")
    vision = {"timm_model_name": "vit_base_patch14_dinov2.lvd142m", "image_size": size}
    write_json(folder / "tiny.json", {"embed_dim": 32, "vision_cfg": vision})
    return folder


layouts = pytest.mark.parametrize("layout", [hub_layout, trainer_layout])


@pytest.mark.skipif("llava-rad" not in FAMILIES, reason="only the full set of golden values has a BiomedCLIP")
@layouts
def test_golden_features_of_biomedclip_as_the_encoder_that_the_user_names(tmp_path, layout):
    rad = GOLDEN / "llava-rad"
    stored = torch.load(rad / "encoder-biomedclip" / "biomedclipcxr_518_checkpoint.pt", weights_only=True)["state_dict"]
    weights = {name.removeprefix("module."): tensor for name, tensor in stored.items()}
    libra = read_again(rad / "model", encoder=layout(tmp_path / "encoder", weights, size=56))
    assert libra.pixels == load("llava-rad").pixels
    study = study_of(read_json(rad / "case0" / "expected.json"))
    expected = load_file(rad / "case0" / "expected.safetensors")["features"]
    assert relative(libra.features(libra.preprocess(study.images())), expected) < 1e-4

    # saved, it names this encoder and no longer the two files; what these told of the template stays
    libra.save_pretrained(tmp_path / "saved")
    assert "mm_vision_tower_config" not in read_json(tmp_path / "saved" / "config.json")
    again = read_again(tmp_path / "saved")
    same_weights(again, libra)
    assert again.template == libra.template


@layouts
@pytest.mark.parametrize("connector", ["TAC", "mlp2x_gelu"])
def test_a_new_model_with_biomedclip_reads_back(tmp_path, layout, connector):
    libra = Libra.from_parts(SEVEN, layout(tmp_path / "encoder", timm_vit()), connector, device="cpu")
    libra.save_pretrained(tmp_path / "a" / "model")
    libra.save_connector(tmp_path / "a" / "connector")
    for place in ("model", "connector"):
        again = read_again(tmp_path / "a" / place)
        assert torch.equal(last_logits(again, STUDY), last_logits(libra, STUDY)), place
        assert (again.template, again.pixels) == (libra.template, libra.pixels)


def test_a_language_model_that_was_a_libra_s_takes_the_encoder_that_is_given(tmp_path):
    """Its config.json names another encoder in every way that there is."""
    decoder = copy_of("libra-7b", tmp_path / "decoder")
    files = dict(mm_vision_tower_config="a.json", mm_vision_tower_checkpoint="a.pt")
    change(decoder / "config.json", **files, unfreeze_mm_vision_tower=True, use_maira_feature_norm=True)
    libra = Libra.from_parts(decoder, hub_layout(tmp_path / "encoder", timm_vit()), device="cpu")
    stored = timm_vit()["visual.trunk.blocks.1.mlp.fc1.weight"]
    assert torch.equal(libra.encoder.layers[1].fc1.weight, stored) and not libra.encoder.config.final_norm
    libra.save_pretrained(tmp_path / "saved")
    same_weights(read_again(tmp_path / "saved"), libra)


@pytest.mark.parametrize(
    ("model", "pixels", "words"),
    [
        (dict(timm_model_name="vit_huge_patch14_224"), {}, "timm_model_name"), (None, {}, "vision_cfg"),
        ([], {}, "vision_cfg"), (dict(image_size=[16, 17]), {}, "image_size"),
        ({}, dict(size=24), "position_embeddings"),
        (dict(image_size=16), dict(size=24), "size 24"),
        ({}, dict(interpolation="bilinear"), "interpolation"), ({}, dict(resize_mode="squash"), "resize_mode"),
        ({}, dict(mean=0.5), "mean"), ({}, dict(std=[0.2, 0, 0.2]), "std"), ({}, dict(mean=[None] * 3), "mean"),
        ({}, 3, "preprocess_cfg"),
    ],
)  # fmt: skip
def test_an_open_clip_config_that_we_do_not_compute_is_refused_by_name(tmp_path, model, pixels, words):
    file = hub_layout(tmp_path / "encoder", timm_vit()) / "open_clip_config.json"
    config = read_json(file)
    if isinstance(model, dict):
        config["model_cfg"]["vision_cfg"] |= model
    else:
        config["model_cfg"]["vision_cfg"] = model
    config["preprocess_cfg"] = config["preprocess_cfg"] | pixels if isinstance(pixels, dict) else pixels
    write_json(file, config)
    refused(words, Libra.from_parts, SEVEN, file.parent, device="cpu")


def test_an_encoder_without_its_weights_is_refused(tmp_path):
    (hub_layout(tmp_path / "encoder", timm_vit()) / "open_clip_pytorch_model.bin").unlink()
    refused("open_clip_pytorch_model.bin", Libra.from_parts, SEVEN, tmp_path / "encoder", device="cpu")
