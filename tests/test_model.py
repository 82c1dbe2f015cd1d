"""The oracles: golden values, and whole rows computed at once, which a cache must not change."""

import itertools
import json
import shutil
import warnings

import pytest
import torch
from conftest import FAMILIES, GOLDEN, cases, change, last_logits, load, read, read_again, relative, study_of
from safetensors.torch import load_file, save_file

from decoder import Cache
from plumbing.layout import libra_config

BOTH = pytest.mark.parametrize("family", ["libra-7b", "libra-3b"])
CASE = GOLDEN / "libra-3b" / "case0"
STUDY = study_of(json.loads((CASE / "expected.json").read_text()))
EXPECTED = load_file(CASE / "expected.safetensors")


@pytest.mark.parametrize(("family", "case"), cases(), ids=lambda value: getattr(value, "name", value))
def test_golden_embeddings_and_logits(family, case):
    libra, expected = load(family), load_file(case / "expected.safetensors")
    described = read(family, case.name, "expected.json")
    embeddings = libra.splice(described["input_ids"], image_embeddings(libra, study_of(described)))
    logits = uncached(libra, embeddings)
    assert relative(embeddings, expected["inputs_embeds"]) < 1e-4
    assert relative(logits[-1], expected["last_logits"]) < 1e-4
    assert relative(logits.mean(-1), expected["all_logits_mean"]) < 1e-4


def image_embeddings(libra, study=STUDY):
    return libra.embed_images(libra.preprocess(study.images()))


def uncached(libra, embeddings):
    """Logits [T, V] of one row, computed at once."""
    return libra.logits(libra.decoder(embeddings[None], torch.arange(len(embeddings))[None])[0])


# ------------------------------------------------------------------------------------------------- cache


def random_ids(*shape, seed=0):
    return torch.randint(700, shape, generator=torch.Generator().manual_seed(seed)).tolist()


def prefixes(libra, *lengths):
    """A cache with random prefixes of these lengths, and their ids."""
    ids = [random_ids(length, seed=length) for length in lengths]
    cache = Cache(libra.decoder.config, len(lengths), max(lengths), libra.device, libra.dtype)
    for study, row in enumerate(ids):
        libra.prefill(cache, study, libra.splice(row, None))
    return cache, ids


@BOTH
def test_a_prefill_in_chunks_and_steps_is_one_row_computed_at_once(family):
    libra, ids = load(family), random_ids(45)
    reference = uncached(libra, libra.splice(ids, None))
    cache = Cache(libra.decoder.config, 1, 33, libra.device, libra.dtype)
    for chunk in (slice(0, 7), slice(7, 8), slice(8, 33)):
        logits = libra.prefill(cache, 0, libra.splice(ids[chunk], None))
        assert relative(logits, reference[chunk.stop - 1]) < 1e-5
    cache.start(1)
    for position in range(33, 45):
        assert relative(libra.decode_step(cache, [[ids[position]]])[0, 0], reference[position]) < 1e-5


@BOTH
def test_continuations_of_ragged_prefixes_are_rows_computed_at_once(family):
    """Two studies, three continuations of each with their own tokens, reordered on the way, over two blocks."""
    libra, K = load(family), 3
    cache, ids = prefixes(libra, 33, 7)
    rows = [[list(prefix) for _ in range(K)] for prefix in ids]
    cache.start(K)
    orders = {0: [[2, 0, 1], [0, 1, 2]], 5: [[1, 1, 0], [2, 2, 2]], 64: [[0, 2, 2], [1, 0, 1]], 66: [[2, 1, 0]] * 2}
    for step in range(Cache.BLOCK + 7):
        # the rows take the caches' new order, then one token each
        if step in orders:
            cache.reorder(orders[step])
            rows = [[list(rows[b][parent]) for parent in orders[step][b]] for b in range(2)]
        tokens = random_ids(2, K, seed=step)
        logits = libra.decode_step(cache, tokens)
        for b, k in itertools.product(range(2), range(K)):
            rows[b][k].append(tokens[b][k])
            # around every reordering and the second block
            if step in (0, 1, 5, 6, 63, 64, 65, 66, 70):
                reference = uncached(libra, libra.splice(rows[b][k], None))[-1]
                assert relative(logits[b, k], reference) < 1e-5, (step, b, k)


@BOTH
def test_a_prefix_can_grow_and_be_continued_again(family):
    libra, ids = load(family), random_ids(40)
    cache, (first,) = prefixes(libra, 7)
    cache.start(2)
    for token in ids[:3]:
        libra.decode_step(cache, [[token, 5]])
    cache.reserve(40)
    libra.prefill(cache, 0, libra.splice(ids[:33], None))
    cache.start(1)
    logits = libra.decode_step(cache, [[ids[33]]])[0, 0]
    assert relative(logits, uncached(libra, libra.splice(first + ids[:34], None))[-1]) < 1e-5


def test_any_number_of_beams_shares_one_prefix():
    """Neither a step nor a reordering copies or moves it, and only the suffixes grow with the beams."""
    libra = load("libra-3b")
    cache, _ = prefixes(libra, 33, 7)
    prefix = [tensor for pair in cache.prefix for tensor in pair]
    values, suffixes = [tensor.clone() for tensor in prefix], {}
    for K in (1, 10):
        cache.start(K)
        for step in range(3):
            libra.decode_step(cache, random_ids(2, K, seed=step))
            cache.reorder([[K // 2] * K] * 2)
        suffixes[K] = sum(tensor.untyped_storage().nbytes() for tensor in cache.suffix)
    now = [tensor for pair in cache.prefix for tensor in pair]
    for tensor, before, value in zip(now, prefix, values, strict=True):
        assert tensor.data_ptr() == before.data_ptr() and torch.equal(tensor, value)
        assert tensor.untyped_storage().nbytes() == 2 * 2 * 33 * 16 * 4  # B, H_kv, P, D, bytes
    assert len(now) == 3 * 2  # layers, keys and values
    assert suffixes[10] == 10 * suffixes[1]


# -------------------------------------------------------------------------------------------- the images


@BOTH
def test_without_a_prior_the_current_image_takes_its_place_and_is_encoded_once(family):
    libra = load(family)
    (image,) = study_of(dict(current="0.png", prior=None, query="")).images()
    encoded = []
    hook = libra.encoder.register_forward_hook(lambda module, inputs, output: encoded.append(len(inputs[0])))
    alone, twice = (libra.embed_images(libra.preprocess(images)) for images in ([image], [image, image]))
    hook.remove()
    assert encoded == [1, 2] and relative(alone, twice) < 1e-5


@BOTH
def test_the_image_replaces_its_placeholder(family):
    libra, image = load(family), torch.randn(3, load(family).decoder.config.hidden_size)
    table = libra.decoder.embed_tokens.weight
    assert torch.equal(libra.splice([5, 6, -200, 7], image), torch.cat((table[[5, 6]], image, table[[7]])))
    assert torch.equal(libra.splice([5, 6], None), table[[5, 6]])


# ----------------------------------------------------------------------------------------------- loading


@pytest.fixture
def copy(tmp_path):
    """The 3b checkpoint, which is one file of weights, in a place of its own with its encoder."""
    for part in ("model", "encoder-dinov2"):
        shutil.copytree(GOLDEN / "libra-3b" / part, tmp_path / part)
    return tmp_path / "model"


def split_off_connector(folder, scale):
    """Write a connector, its last bias scaled, to mm_tac_projector.bin; returns the other weights."""
    weights = load_file(folder / "model.safetensors")
    connector = {name: weights.pop(name) for name in list(weights) if name.startswith("model.mm_projector.")}
    connector["model.mm_projector.mlp_final.6.bias"] *= scale
    torch.save(connector, folder / "mm_tac_projector.bin")
    return weights


def add_weights(folder, **weights):
    save_file(load_file(folder / "model.safetensors") | weights, folder / "model.safetensors")


UNSUPPORTED = [
    ("model_type", "mamba"), ("rope_scaling", dict(rope_type="mystery", factor=2.0)),
    ("mm_projector_type", "qformer"), ("mm_projector_type", "mlp2x_gelu"), ("mm_image_pad", "red"),
    ("mm_vision_select_feature", "pooled"), ("mm_vision_select_layer", "last"), ("mm_vision_select_layer", 13),
    ("mm_vision_select_layer", 10**30), ("mm_vision_select_layer", None), ("mm_vision_select_layer", True),
    ("mm_vision_tower", None), ("mm_vision_tower", ["a"]), ("mm_projector_type", None),
    ("mm_projector_type", "x" * 9999), ("mm_projector_type", "mlp99999999x_gelu"), ("image_aspect_ratio", "anyres"),
    ("mm_patch_merge_type", "spatial"), ("s2", True), ("mm_resampler_type", "perceiver"),
    ("mm_use_im_start_end", "yes"), ("torch_dtype", ["float16"]),
    ("mm_conversation_template", {}), ("mm_vision_tower_config", 5), ("eos_token_id", -1), ("eos_token_id", [2, 700]),
    ("eos_token_id", "2"), ("num_hidden_layers", 100_000), ("rms_norm_eps", -1), ("rope_theta", 0),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), UNSUPPORTED)
def test_an_unsupported_checkpoint_is_refused_by_the_name_of_its_field(copy, field, value):
    change(copy / "config.json", **{field: value})
    (copy / "generation_config.json").unlink()
    with pytest.raises(ValueError, match=field) as refused:
        read_again(copy)
    assert "\n" not in str(refused.value)


def test_a_layer_that_is_written_as_text_is_read(copy):
    change(copy / "config.json", mm_vision_select_layer="-2")
    config = json.loads((copy / "config.json").read_text())
    assert libra_config(config, copy).mm_vision_select_layer == -2


def test_an_image_that_is_smaller_than_a_patch_is_refused(copy):
    settings = dict(size={"shortest_edge": 5}, crop_size={"height": 5, "width": 5})
    change(copy.parent / "encoder-dinov2" / "preprocessor_config.json", **settings)
    with pytest.raises(ValueError, match="images of 5 pixels"):
        read_again(copy)


def test_the_image_processor_of_transformers_5_is_read_and_copied(copy):
    """processor_config.json holds it alone. Oracle: the golden logits."""
    folder = copy.parent / "encoder-dinov2"
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    (folder / "preprocessor_config.json").unlink()
    read_again(copy).save_pretrained(copy.parent / "out", with_encoder=True)
    assert relative(last_logits(read_again(copy.parent / "out"), STUDY), EXPECTED["last_logits"]) < 1e-4


def test_a_language_model_alone_is_refused(copy):
    config = json.loads((copy / "config.json").read_text())
    del config["mm_vision_tower"]
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="mm_vision_tower"):
        read_again(copy)


def test_a_golden_checkpoint_loads_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for family in FAMILIES:
            libra = read_again(GOLDEN / family / "model")
            assert not libra.training and not any(parameter.requires_grad for parameter in libra.parameters())


def test_a_connector_beside_the_checkpoint_is_read(copy):
    save_file(split_off_connector(copy, scale=1), copy / "model.safetensors")
    assert relative(image_embeddings(read_again(copy)), EXPECTED["image_embeddings"]) < 1e-4


def test_a_connector_inside_the_checkpoint_wins_over_one_beside_it(copy):
    split_off_connector(copy, scale=-3)
    assert relative(image_embeddings(read_again(copy)), EXPECTED["image_embeddings"]) < 1e-4


def test_tensors_that_the_model_does_not_use_are_ignored_silently(copy):
    """A tied head, rotary frequencies of old transformers, and an encoder that was not trained."""
    extra = {"lm_head.weight": torch.randn(700, 96)}
    extra |= {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.randn(8) for n in range(3)}
    encoder = load_file(copy.parent / "encoder-dinov2" / "model.safetensors")
    extra |= {f"model.vision_tower.vision_tower.{name}": torch.randn(weight.shape) for name, weight in encoder.items()}
    add_weights(copy, **extra)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert relative(last_logits(read_again(copy), STUDY), EXPECTED["last_logits"]) < 1e-4


def test_a_trained_encoder_inside_the_checkpoint_wins_over_the_stock_one(copy):
    stock = copy.parent / "encoder-dinov2" / "model.safetensors"
    encoder = load_file(stock)
    inside = {f"model.vision_tower.vision_tower.{name}": weight for name, weight in encoder.items()}
    add_weights(copy, **inside)
    save_file({name: torch.randn(weight.shape) for name, weight in encoder.items()}, stock)
    change(copy / "config.json", unfreeze_mm_vision_tower=True)
    assert relative(last_logits(read_again(copy), STUDY), EXPECTED["last_logits"]) < 1e-4


def test_another_encoder_can_be_named(copy):
    elsewhere = (copy.parent / "encoder-dinov2").rename(copy.parent / "elsewhere")
    assert relative(last_logits(read_again(copy, encoder=elsewhere), STUDY), EXPECTED["last_logits"]) < 1e-4


def test_weights_in_pytorch_model_bin_load(copy):
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    assert relative(last_logits(read_again(copy), STUDY), EXPECTED["last_logits"]) < 1e-4


def test_ids_that_the_tokenizer_lacks_are_never_generated(copy):
    """A padded vocabulary: logits are cut to the tokenizer's 700 ids, and one for <im_patch> where it is used."""
    table = load("libra-3b").decoder.embed_tokens.weight
    add_weights(copy, **{"model.embed_tokens.weight": torch.cat((table, torch.ones(12, 96)))})
    change(copy / "config.json", vocab_size=712)
    logits = last_logits(read_again(copy), STUDY)
    assert logits.shape == (700,) and relative(logits, EXPECTED["last_logits"]) < 1e-4
    change(copy / "config.json", mm_use_im_patch_token=True)
    assert last_logits(read_again(copy), STUDY).shape == (701,)


def test_a_generation_setting_that_is_not_applied_warns(copy):
    change(copy / "generation_config.json", repetition_penalty=1.2)
    with pytest.warns(UserWarning, match=r"repetition_penalty 1\.2"):
        assert read_again(copy).eos_token_ids == [694, 698]


def test_without_a_generation_config_its_settings_may_be_in_the_config(copy):
    (copy / "generation_config.json").unlink()
    change(copy / "config.json", repetition_penalty=1.2)
    with pytest.warns(UserWarning, match=r"config\.json: repetition_penalty 1\.2"):
        read_again(copy)


def test_eos_comes_from_the_generation_config_else_from_the_config(copy):
    change(copy / "generation_config.json", eos_token_id=3)
    assert read_again(copy).eos_token_ids == [3]
    (copy / "generation_config.json").unlink()
    assert read_again(copy).eos_token_ids == [694, 698]


@BOTH
def test_bfloat16_stays_near_float32(family):
    exact, libra, ids = load(family), read_again(GOLDEN / family / "model", dtype="bfloat16"), random_ids(33)
    logits, images = uncached(libra, libra.splice(ids, None)), image_embeddings(libra)
    assert libra.dtype == images.dtype == torch.bfloat16 and logits.dtype == torch.float32
    assert relative(logits, uncached(exact, exact.splice(ids, None))) < 0.05
    assert relative(images, image_embeddings(exact)) < 0.05
