"""The oracles: the language models of `transformers`, the adapters of `peft`, and whole rows computed at once."""

import peft
import pytest
import torch
import transformers
from conftest import relative
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from decoder import Cache, Decoder, DecodingStep, Prefill, decoder_config, names_of, rope_frequencies
from lora import LoRAConfig, LoRALinear, add_lora, lora_parameters, merge_lora
from plumbing import checkpoint
from plumbing.files import read_json

LLAMA3 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
)
LONGROPE = dict(
    rope_type="longrope", short_factor=[1.0, 1.1, 1.3], long_factor=[1.5, 2.0, 4.0], original_max_position_embeddings=20
)
SIZES = dict(
    vocab_size=97, hidden_size=48, intermediate_size=72, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, rms_norm_eps=1e-5, max_position_embeddings=128, pad_token_id=None,
)  # fmt: skip
rope = lambda theta=5000.0, **fields: dict(rope_theta=theta, **({"rope_type": "default"} | fields))
ROWS = {  # family and what is special in it -> the class in `transformers`, its config
    "llama": ("Llama", dict(num_attention_heads=6, num_key_value_heads=2, head_dim=12, rope_parameters=rope(**LLAMA3))),
    "llama tied": ("Llama", dict(num_key_value_heads=None, tie_word_embeddings=True, rope_parameters=rope())),
    "mistral": ("Mistral", dict(num_key_value_heads=1, head_dim=24, sliding_window=None)),
    "mistral window": ("Mistral", dict(sliding_window=7)),
    "qwen2": ("Qwen2", dict(num_key_value_heads=4)),
    "qwen2 window": ("Qwen2", dict(use_sliding_window=True, sliding_window=7, max_window_layers=1)),
    "qwen2 window unused": ("Qwen2", dict(use_sliding_window=False, sliding_window=7, max_window_layers=1)),
    "qwen3": ("Qwen3", dict(head_dim=20)),
    "phi3": ("Phi3", {}),
    "phi3 window": ("Phi3", dict(sliding_window=7)),
    "phi4 mini": ("Phi3", dict(tie_word_embeddings=True, rope_parameters=rope(partial_rotary_factor=0.5))),
    "phi3 longrope": ("Phi3", dict(rope_parameters=rope(partial_rotary_factor=0.5, **LONGROPE))),
    "phi3 longrope, factor": (
        "Phi3", dict(rope_parameters=rope(partial_rotary_factor=0.5, attention_factor=1.3, **LONGROPE))
    ),
    "gemma": ("Gemma", dict(head_dim=20, num_key_value_heads=1)),
    "gemma gelu": ("Gemma", dict(head_dim=12, hidden_act="gelu")),
}  # fmt: skip


def random_model(row):
    """A random language model in `transformers`."""
    name, changes = ROWS[row]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES | changes)
    if "longrope" in row:
        config.original_max_position_embeddings = 20
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for parameter, weight in model.named_parameters():
        torch.nn.init.normal_(weight, float("norm" in parameter and name != "Gemma"), 0.2)
    return model


def read(folder):
    """Our decoder from what `transformers` saved."""
    config = read_json(folder / "config.json")
    decoder = Decoder(decoder_config(config, folder))
    stored = checkpoint.list_tensors(checkpoint.locate(folder))
    stored = {name.removeprefix("model."): tensor for name, tensor in stored.items()}
    if decoder.config.tie_word_embeddings:
        stored.pop("lm_head.weight", None)
    tensors, parameters = checkpoint.rename_tensors(stored, names_of(config), decoder), dict(decoder.named_parameters())
    checkpoint.check_fit(parameters, tensors, "")
    checkpoint.load_tensors(parameters, tensors)
    return decoder.requires_grad_(False), names_of(config)


@pytest.fixture(scope="module", params=ROWS)
def pair(request, tmp_path_factory):
    """(theirs, ours) of one row."""
    theirs, folder = random_model(request.param), tmp_path_factory.mktemp("decoder")
    theirs.save_pretrained(folder)
    return theirs, read(folder)[0]


def random_ids(*shape):
    return torch.randint(97, shape, generator=torch.Generator().manual_seed(1))


def logits_of(decoder, ids):
    positions = torch.arange(ids.shape[1]).expand(len(ids), -1)
    return decoder.head(decoder(decoder.embed_tokens(ids), positions), 97)


@pytest.mark.parametrize("length", [33, 20, 5])  # around longrope's original length and the windows'
def test_logits_are_those_of_transformers(pair, length):
    theirs, ours = pair
    ids = random_ids(2, length)
    with torch.no_grad():
        assert relative(logits_of(ours, ids), theirs(ids).logits) < 1e-5


def test_a_prefill_in_chunks_and_steps_of_many_continuations_is_one_row_computed_at_once(pair):
    """Three continuations of a prefix; for longrope the prefix is a long row already."""
    _, ours = pair
    prefix, suffixes = random_ids(25), random_ids(3, 9)
    rows = torch.cat((prefix.expand(3, -1), suffixes), 1)
    expected = logits_of(ours, rows)
    cache = Cache(ours.config, 1, 25, "cpu", torch.float32)
    step = lambda ids, positions, attend: ours.head(
        ours(ours.embed_tokens(ids), positions, attend, torch.tensor([25])), 97
    )
    for chunk in (range(0, 11), range(11, 12), range(12, 25)):
        out = step(prefix[None, list(chunk)], torch.tensor([list(chunk)]), Prefill(cache, 0, chunk[0]))
        cache.advance(len(chunk), study=0)
        assert relative(out[0], expected[0, list(chunk)]) < 1e-5
    cache.start(3)
    for place in range(9):
        out = step(suffixes[None, :, place], torch.full((1, 3), 25 + place), DecodingStep(cache))
        cache.advance(1)
        assert relative(out[0], expected[:, 25 + place]) < 1e-5


def test_longrope_goes_by_each_row_s_own_length(tmp_path):
    theirs = random_model("phi3 longrope")
    theirs.save_pretrained(tmp_path)
    ours = read(tmp_path)[0]
    assert ours.config.rope_switch == 20
    ids, lengths = random_ids(2, 18), torch.tensor([18, 30])
    positions = torch.arange(18).expand(2, -1)
    with torch.no_grad():
        out = ours.head(ours(ours.embed_tokens(ids), positions, lengths=lengths), 97)
        longer = logits_of(ours, torch.cat((ids, random_ids(2, 12)), 1))[:, :18]
    assert relative(out[0], logits_of(ours, ids)[0]) < 1e-6
    assert relative(out[1], longer[1]) < 1e-6


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Qwen2", "Qwen3", "Phi3", "Gemma"])
def test_fields_that_config_json_omits_are_those_of_transformers(name):
    theirs = getattr(transformers, f"{name}Config")()
    ours = decoder_config({"model_type": name.lower()}, "folder")
    for field in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                  "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "hidden_act",
                  "tie_word_embeddings"):  # fmt: skip
        assert getattr(ours, field) == getattr(theirs, field), field
    assert ours.sliding_window == getattr(theirs, "sliding_window", None)
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]


@pytest.mark.parametrize("scaling", [LLAMA3 | dict(factor=32.0, original_max_position_embeddings=8192), None])
def test_rotary_frequencies_of_the_published_sizes_are_those_of_transformers(scaling):
    config = dict(hidden_size=3072, num_attention_heads=24, head_dim=128, rope_theta=500000.0)
    ours = rope_frequencies(decoder_config(config | dict(model_type="libra", rope_scaling=scaling), "folder"), "cpu")
    parameters = {"rope_theta": 500000.0, "rope_type": "default"} | (scaling or {})
    if scaling:
        config = transformers.LlamaConfig(**config, rope_parameters=parameters)
        theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    else:
        theirs = 1 / 500000.0 ** (torch.arange(0, 128, 2, dtype=torch.float64) / 128)
    torch.testing.assert_close(ours, theirs.float(), atol=0, rtol=1e-5)


UNSUPPORTED = [
    ("gemma2", {}, "model_type"), ("libra_gemma3", {}, "model_type"),
    ("qwen3", dict(attention_bias=True), "attention_bias"), ("llama", dict(mlp_bias=True), "mlp_bias"),
    ("mistral", dict(hidden_act="relu"), "hidden_act"),
    ("qwen2", dict(rope_scaling=dict(type="yarn", factor=4.0)), "yarn"),
    ("phi3", dict(rope_scaling=dict(type="longrope", long_factor=[1.0])), "short_factor"),
    ("llama", dict(rope_scaling=dict(type="linear", factor=2.0)), "linear"),
    ("llama", dict(rope_scaling=dict(rope_type="llama3", factor=8.0)), "low_freq_factor"),
]  # fmt: skip


@pytest.mark.parametrize(("model_type", "fields", "word"), UNSUPPORTED)
def test_an_unsupported_decoder_is_refused_by_the_name_of_its_field(model_type, fields, word):
    with pytest.raises(ValueError, match=word) as refused:
        decoder_config(dict(model_type=model_type) | fields, "folder")
    assert "folder/config.json" in str(refused.value)


# -------------------------------------------------------------------------------------------------- LoRA

TARGETS = {
    "llama": [("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), ("q_proj", "down_proj")],
    "phi3": [("qkv_proj", "o_proj", "gate_up_proj", "down_proj"), ("qkv_proj",)],
}
CASES = [(row, targets, rslora) for row in TARGETS for targets in TARGETS[row] for rslora in (False, True)]


def lora_of_peft(theirs, names):
    """(our name, PEFT's parameter, our names of its parts) of every LoRA parameter of a model of `peft`."""
    for name, weight in theirs.named_parameters():
        if ".lora_" in name:
            name = name.removeprefix("base_model.model.model.").replace(".default", "")
            parts = [name]
            for fused, projections in names.fused.items():
                if f".{fused}." in name:
                    parts = [name.replace(f".{fused}.", f".{projection}.") for projection in projections]
            yield name, weight, parts


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]} {len(case[1])} {'rslora' * case[2]}")
def adapted(request, tmp_path):
    """(a model of `peft`, our decoder with the same random adapter, how the family names its parameters)."""
    row, targets, rslora = request.param
    theirs = random_model(row)
    theirs.save_pretrained(tmp_path)
    ours, names = read(tmp_path)
    settings = dict(r=3, lora_alpha=7.0, lora_dropout=0.0, use_rslora=rslora)
    theirs = peft.get_peft_model(
        theirs, peft.LoraConfig(**settings, target_modules=list(targets), task_type="CAUSAL_LM")
    ).eval()
    add_lora(ours, names, LoRAConfig(**settings, target_modules=targets))
    parameters = lora_parameters(ours)
    for name, weight, parts in lora_of_peft(theirs, names):
        torch.nn.init.normal_(weight, std=0.3)
        # parts of a fused module share A and split B's rows
        values = [weight] * len(parts)
        if "lora_B" in name:
            values = weight.split([len(parameters[part]) for part in parts])
        with torch.no_grad():
            for part, value in zip(parts, values, strict=True):
                parameters[part].copy_(value)
    return theirs, ours, names


def test_lora_is_peft_s_forward_backward_and_merged(adapted):
    theirs, ours, names = adapted
    # in float64: rounding alone comes near the limit in some draws
    theirs, ours = theirs.double(), ours.double()
    ids = random_ids(2, 11)
    logits, expected = logits_of(ours, ids), theirs(ids).logits
    assert relative(logits.detach(), expected.detach()) < 1e-5

    # the gradients of a random sum of the logits
    weights = torch.randn(logits.shape)
    (logits * weights).sum().backward()
    (expected * weights).sum().backward()
    gradients = {name: parameter.grad for name, parameter in lora_parameters(ours).items()}
    assert {name for name, parameter in ours.named_parameters() if parameter.requires_grad} <= gradients.keys()
    for name, weight, parts in lora_of_peft(theirs, names):
        gradient = gradients[parts[0]]
        if "lora_B" in name:
            gradient = torch.cat([gradients[part] for part in parts])
        assert relative(gradient, weight.grad) < 1e-4, name

    merge_lora(ours)
    assert not any(isinstance(module, LoRALinear) for module in ours.modules())
    with torch.no_grad():
        assert relative(logits_of(ours, ids), expected) < 1e-5
        assert relative(logits_of(ours, ids), theirs.merge_and_unload()(ids).logits) < 1e-5


def test_a_fresh_adapter_changes_nothing_and_starts_as_peft_s(tmp_path):
    random_model("llama").save_pretrained(tmp_path)
    ours, names = read(tmp_path)
    before = logits_of(ours, random_ids(2, 11))
    config = LoRAConfig(r=8, lora_alpha=16.0, target_modules=("q_proj", "down_proj"), lora_dropout=0.5)
    add_lora(ours, names, config)
    assert torch.equal(logits_of(ours.eval(), random_ids(2, 11)), before)
    for name, parameter in lora_parameters(ours).items():
        bound = parameter.shape[1] ** -0.5  # Kaiming's, with a = √5
        assert parameter.requires_grad and (parameter.abs().max() <= bound if "lora_A" in name else not parameter.any())
    assert sum(p.requires_grad for p in ours.parameters()) == len(lora_parameters(ours)) == 3 * 2 * 2


def test_dropout_stands_before_the_first_matrix(tmp_path):
    random_model("llama").save_pretrained(tmp_path)
    ours, names = read(tmp_path)
    add_lora(ours, names, LoRAConfig(r=8, lora_alpha=16.0, target_modules=("q_proj",), lora_dropout=0.5))
    module = ours.train().layers[0].self_attn.q_proj
    torch.nn.init.ones_(module.lora_A.weight)
    torch.nn.init.ones_(module.lora_B.weight)
    out = module(torch.ones(4000, 48)) - module.base_layer(torch.ones(4000, 48))
    sums = (out[:, 0] / (8 * module.scale * 2)).round(decimals=3)  # how many of the 48 channels were kept
    assert torch.equal(sums, sums.round()) and 22 < sums.mean() < 26


@pytest.mark.parametrize(("row", "target"), [("llama", "qkv_proj"), ("phi3", "q_proj"), ("llama", "lm_head")])
def test_a_target_that_the_family_lacks_is_refused(tmp_path, row, target):
    random_model(row).save_pretrained(tmp_path)
    ours, names = read(tmp_path)
    with pytest.raises(ValueError, match=f"no target '{target}'"):
        add_lora(ours, names, LoRAConfig(r=8, lora_alpha=16.0, target_modules=("o_proj", target)))
