"""The oracles: the language models of `transformers`, the adapters of `peft`, and whole rows computed at once."""

import json
import math
from collections import Counter
from dataclasses import fields

import peft
import pytest
import torch
import transformers
from conftest import change, relative
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RopeParameters

from decoder import FAMILIES, Cache, Decoder, DecoderConfig, DecodingStep, Prefill, rope_frequencies
from lora import LoRAConfig, LoRALinear, add_lora, lora_parameters, merge_lora
from plumbing import checkpoint
from plumbing.families import DROPOUTS, decoder_config, names_of
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
    "qwen3 layer types": ("Qwen3", dict(
        use_sliding_window=True, sliding_window=7, max_window_layers=3,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )),
    "llama biases": ("Llama", dict(attention_bias=True, mlp_bias=True)),
    "qwen3 biases": ("Qwen3", dict(attention_bias=True)),
    "gemma biases": ("Gemma", dict(attention_bias=True, head_dim=12)),
    "llama linear": ("Llama", dict(rope_parameters=rope(rope_type="linear", factor=2.5))),
    "llama longrope": ("Llama", dict(head_dim=6, rope_parameters=rope(**LONGROPE))),
    "phi3": ("Phi3", {}),
    "phi3 window": ("Phi3", dict(sliding_window=7)),
    "phi4 mini": ("Phi3", dict(tie_word_embeddings=True, rope_parameters=rope(partial_rotary_factor=0.5))),
    "phi3 longrope": ("Phi3", dict(rope_parameters=rope(partial_rotary_factor=0.5, **LONGROPE))),
    "phi3 longrope, factor": (
        "Phi3", dict(rope_parameters=rope(partial_rotary_factor=0.5, attention_factor=1.3, **LONGROPE))
    ),
    "phi3 longrope, stretch": ("Phi3", dict(rope_parameters=rope(partial_rotary_factor=0.5, factor=3.0, **LONGROPE))),
    "gemma": ("Gemma", dict(head_dim=20, num_key_value_heads=1)),
    # rows whose config.json is edited below
    "llama, rope under both names": ("Llama", dict(rope_parameters=rope())),
    "llama, original length outside": ("Llama", dict(rope_parameters=rope(**LLAMA3))),
    "llama, fields it does not read": ("Llama", {}),
    "mistral, fields it does not read": ("Mistral", dict(sliding_window=7)),
    "qwen2, before layer_types": ("Qwen2", dict(use_sliding_window=True, sliding_window=7, max_window_layers=1)),
    "phi3, fields it does not read": ("Phi3", dict(sliding_window=7)),
    "phi3, su": ("Phi3", dict(rope_parameters=rope(**LONGROPE | dict(short_factor=[1.5] * 6, long_factor=[2.0] * 6)))),
    "gemma, gelu": ("Gemma", dict(head_dim=12)),
    "gemma, fields it does not read": ("Gemma", dict(head_dim=12)),
}  # fmt: skip
# what a file has that `transformers` would not write, or writes for other families
WINDOWS = dict(sliding_window=7, layer_types=["sliding_attention"] * 3, max_window_layers=0)
EDITS = {
    "llama, rope under both names": dict(rope_scaling=dict(type="linear", factor=4.0), rope_theta=700.0),
    "llama, original length outside": dict(original_max_position_embeddings=40),
    "llama, fields it does not read": WINDOWS | dict(use_sliding_window=True, hidden_activation="gelu", qkv_bias=True),
    "mistral, fields it does not read": dict(use_sliding_window=False, max_window_layers=2, attention_bias=True),
    "qwen2, before layer_types": dict(layer_types=None, attention_bias=False),
    "phi3, fields it does not read": dict(use_sliding_window=False, max_window_layers=2, attention_bias=True),
    "phi3, su": dict(rope_parameters=None, rope_scaling=LONGROPE | dict(
        rope_type="su", short_factor=[1.5] * 6, long_factor=[2.0] * 6)),
    "gemma, gelu": dict(hidden_act="gelu", hidden_activation="gelu_pytorch_tanh"),
    "gemma, fields it does not read": WINDOWS | dict(use_sliding_window=True, mlp_bias=True),
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
    folder = tmp_path_factory.mktemp("decoder")
    random_model(request.param).save_pretrained(folder)
    change(folder / "config.json", **EDITS.get(request.param, {}))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
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
        cache.advance(len(chunk), row=0)
        assert relative(out[0], expected[0, list(chunk)]) < 1e-5
    cache.start(3)
    for place in range(9):
        out = step(suffixes[None, :, place], torch.full((1, 3), 25 + place), DecodingStep(cache))
        cache.advance(1)
        assert relative(out[0], expected[:, 25 + place]) < 1e-5


class Count(TorchDispatchMode):
    """Counts the operations that start a kernel, by name: all but views."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        is_view = any(result.alias_info and not result.alias_info.is_write for result in function._schema.returns)
        if not is_view and name != "_unsafe_view":
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("continuations", "limit"), [(1, 740), (10, 800)])
def test_a_step_of_32_layers_starts_few_operations(continuations, limit):
    sizes = dict(num_hidden_layers=32, hidden_size=16, num_attention_heads=4, intermediate_size=24, vocab_size=50)
    decoder = Decoder(decoder_config(dict(model_type="llama") | sizes, "test")).eval()
    decoder.join()
    cache = Cache(decoder.config, 1, 9, "cpu", torch.float32)
    cache.start(continuations)
    ids = torch.zeros(1, continuations, dtype=torch.long)
    with torch.no_grad():
        for _ in range(2):  # the first step makes room, too
            with Count() as operations:
                hidden = decoder(decoder.embed_tokens(ids), cache.newest.expand(ids.shape), DecodingStep(cache))
                decoder.head(hidden, 50)
            cache.advance(1)
    # a norm is one kernel on a GPU; a CPU computes it in six operations, one of them the only reciprocal root
    assert operations.counts.total() - 5 * operations.counts["rsqrt"] <= limit


def test_joined_layers_give_what_separate_ones_do_and_follow_their_changes(tmp_path):
    """With gradients, after a move, and beside LoRA each layer is computed by itself again."""
    random_model("qwen3 biases").save_pretrained(tmp_path)
    ours = read(tmp_path)[0].requires_grad_(True)
    block, x = ours.layers[0].self_attn, torch.randn(2, 5, 48)
    with torch.no_grad():
        separate = block.project(x)
        block.join()
        for one, other in zip(block.project(x), separate, strict=True):
            assert relative(one, other) < 1e-6
        # the parameters are views: a change in place is seen
        block.k_proj.weight.mul_(2)
        block.k_proj.bias.mul_(2)
        assert relative(block.project(x)[1], 2 * separate[1]) < 1e-6
    assert block.project(x)[0].requires_grad and block.joined
    block.v_proj = LoRALinear(block.v_proj, torch.nn.Linear(48, 2, bias=False), 1.0, 0.0)
    assert not block.joined
    ours.layers[1].mlp.join()
    assert ours.layers[1].mlp.joined and not ours.double().layers[1].mlp.joined


@pytest.mark.parametrize("family", ["llama", "qwen2 window", "phi3 longrope"])
def test_a_compiled_step_is_one_graph_for_all_layers_steps_and_prefixes(family, tmp_path):
    """The same steps without compiling are the oracle. Two windows are two masks of the same shape."""
    random_model(family).save_pretrained(tmp_path)
    ours = read(tmp_path)[0]
    torch.compiler.reset()
    graphs = CompileCounter()
    results = []
    for is_compiled in (False, True):
        if is_compiled:
            ours.compile_step(backend=graphs)
        results.append([])
        for prefix in (25, 30):
            cache = Cache(ours.config, 2, prefix, "cpu", torch.float32)
            cache.lengths += prefix
            cache.start(3)
            ids = random_ids(2, 3)
            with torch.inference_mode():
                for place in range(Cache.BLOCK + 3):
                    positions = torch.full((2, 3), prefix + place)
                    out = ours(ours.embed_tokens(ids), positions, DecodingStep(cache), cache.lengths)
                    cache.advance(1)
            results[-1].append(out)
    for plain, compiled in zip(*results, strict=True):
        assert relative(compiled, plain) < 1e-6
    assert graphs.frame_count == 1


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
    ("gemma2", {}, "model_type"), ("libra_gemma3", {}, "model_type"), ("llama", dict(per_layer_config=[]), "per_layer"),
    ("mistral", dict(hidden_act="relu"), "hidden_act"),
    ("mistral", dict(layer_types=["full_attention", "sliding_attention"]), "layer_types"),
    ("gemma", dict(hidden_activation="gelu"), "hidden_activation"),
    ("gemma", dict(use_bidirectional_attention=True), "use_bidirectional_attention"),
    ("llama", dict(partial_rotary_factor=0.5), "partial_rotary_factor"),
    ("llama", dict(rope_parameters=dict(rope_type="linear", factor=2.0, partial_rotary_factor=0.5)), "partial_rotary"),
    ("qwen2", dict(rope_parameters=dict(full_attention=dict(rope_theta=5.0))), "full_attention"),
    ("phi3", dict(rope_scaling=dict(type="linear", factor=2.0)), "linear"),
    ("llama", dict(rope_scaling=dict(type="dynamic", factor=2.0)), "dynamic"),
    ("qwen2", dict(rope_scaling=dict(type="yarn", factor=4.0)), "yarn"),
    ("phi3", dict(rope_scaling=dict(type="longrope", long_factor=[1.0])), "short_factor"),
    ("llama", dict(rope_scaling=dict(rope_type="llama3", factor=8.0)), "low_freq_factor"),
]  # fmt: skip


@pytest.mark.parametrize(("model_type", "fields", "word"), UNSUPPORTED)
def test_an_unsupported_decoder_is_refused_by_the_name_of_its_field(model_type, fields, word):
    with pytest.raises(ValueError, match=word) as refused:
        decoder_config(dict(model_type=model_type) | fields, "folder")
    assert "folder/config.json" in str(refused.value)


# ------------------------------------------------------------------------------------------ every field

# what `transformers` knows and what changes no number here: outputs, initial values, other tasks, padding
NEUTRAL = [
    "_name_or_path", "architectures", "bos_token_id", "chunk_size_feed_forward", "id2label", "initializer_range",
    "is_encoder_decoder", "label2id", "output_attentions", "output_hidden_states", "pad_token_id", "pretraining_tp",
    "problem_type", "return_dict", "transformers_version", "use_cache",
]  # fmt: skip
# read by `family_of`, `plumbing.layout` and `rope_settings`
ELSEWHERE = ["model_type", "dtype", "eos_token_id", "rope_parameters"]
OF_REFUSED_ROPES = ["beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"]
ROPES = ["default", "linear", "llama3", "longrope"]
REFUSED_ROPES = ["dynamic", "yarn", "proportional"]


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Qwen2", "Qwen3", "Phi3", "Gemma"])
def test_every_field_that_transformers_knows_is_computed_neutral_or_refused(name):
    config, family = getattr(transformers, f"{name}Config"), FAMILIES[name.lower()]
    known = {field.name for field in fields(config)} | set(config().to_dict())
    assert known <= {*family.defaults, *family.supported, *DROPOUTS, *NEUTRAL, *ELSEWHERE}


def test_every_rope_setting_that_transformers_knows_is_computed_neutral_or_refused():
    ours = {field.name for field in fields(DecoderConfig)}
    # frequencies of several axes are those of one where all axes have the same position, as in text
    assert RopeParameters.__annotations__.keys() <= {*ours, *OF_REFUSED_ROPES, "mrope_section"}
    assert set(ROPE_INIT_FUNCTIONS) <= {*ROPES, *REFUSED_ROPES}
    for rope_type in REFUSED_ROPES:
        with pytest.raises(ValueError, match=f"rope_type is '{rope_type}'"):
            decoder_config(dict(model_type="llama", rope_scaling=dict(type=rope_type, factor=2.0)), "folder")


NESTED = json.loads("[" * 500 + "]" * 500)
BAD = [None, "text", [], [1], {}, -1, 0, 1.5, True, math.nan, math.inf, 10**30, 10**400, NESTED, {"a": NESTED}]
ROPE_SETTINGS = dict(rope_theta=1e4, **LLAMA3 | dict(rope_type="llama3")), dict(rope_theta=1e4, **LONGROPE)


def check_one_line(config, *names):
    """A config is accepted, or refused in one short line with the file and a field."""
    try:
        decoder_config(config, "folder")
    except ValueError as error:
        message = str(error)
        assert message.startswith("folder/config.json: ") and "\n" not in message and len(message) < 250
        assert any(name in message for name in names), message
        return message
    return None


@pytest.mark.parametrize("model_type", FAMILIES)
def test_any_value_of_any_field_is_accepted_or_refused_in_one_line(model_type):
    family = FAMILIES[model_type]
    for name in {*family.defaults, *family.supported, "rope_scaling", "rope_parameters"}:
        for value in BAD:
            check_one_line({"model_type": model_type, name: value}, name)
    for settings in ROPE_SETTINGS:
        for name in settings:
            for value in BAD:
                scaling = settings | {name: value}
                check_one_line(dict(model_type=model_type, head_dim=6, rope_scaling=scaling), name, "rope")


MISFITS = [
    dict(rms_norm_eps=-1), dict(rms_norm_eps=0), dict(rms_norm_eps=math.nan), dict(rms_norm_eps=None),
    dict(rope_theta=0), dict(rope_theta=-1.0), dict(rope_theta="10000"), dict(num_hidden_layers=100_000),
    dict(num_hidden_layers=0), dict(vocab_size=-1), dict(hidden_size=10**30), dict(hidden_size=64.0),
    dict(num_attention_heads=0), dict(num_attention_heads=7, hidden_size=48), dict(head_dim=21), dict(head_dim=0),
    dict(num_key_value_heads=3, num_attention_heads=8), dict(num_key_value_heads=0),
    dict(num_key_value_heads=8, num_attention_heads=4), dict(max_position_embeddings=-1),
    dict(tie_word_embeddings="true"), dict(attention_bias=None), dict(mlp_bias=1), dict(hidden_act=None),
    dict(rope_scaling=dict(type="linear", factor=0)), dict(rope_scaling=dict(type="linear", factor=math.nan)),
    dict(rope_scaling=dict(type="linear", factor=None)), dict(rope_scaling="linear"), dict(rope_scaling=[1]),
    dict(rope_scaling=LLAMA3 | dict(high_freq_factor=1.0)), dict(rope_scaling=LONGROPE | dict(attention_factor=0)),
    dict(rope_scaling=LONGROPE), dict(rope_scaling=LONGROPE | dict(short_factor=[1, 0, 1]), head_dim=6),
    dict(rope_scaling=LONGROPE | dict(original_max_position_embeddings=1), head_dim=6),
    dict(model_type="phi3", partial_rotary_factor=0), dict(model_type="phi3", partial_rotary_factor=1.5),
    dict(model_type="mistral", sliding_window=0), dict(model_type="mistral", sliding_window=-1),
    dict(model_type="qwen2", layer_types=["full_attention"]), dict(model_type="qwen2", layer_types=[]),
    dict(model_type="qwen2", max_window_layers=-1),
    dict(model_type="qwen3", layer_types=["sliding_attention"] * 32),
    dict(model_type="qwen3", layer_types=["chunked_attention"] * 32),
    dict(model_type="qwen3", use_sliding_window="yes"),
]  # fmt: skip


@pytest.mark.parametrize("changes", MISFITS, ids=str)
def test_a_value_out_of_its_bounds_is_refused_in_one_line(changes):
    names = [*changes, *(key for value in changes.values() if isinstance(value, dict) for key in value)]
    assert check_one_line(dict(model_type="llama") | changes, *names)


def test_dropout_of_the_decoder_warns():
    """`transformers` applies it in training."""
    with pytest.warns(UserWarning, match=r"attention_dropout 0\.1 is not applied"):
        decoder_config(dict(model_type="llama", attention_dropout=0.1), "folder")


# -------------------------------------------------------------------------------------------------- LoRA

TARGETS = {
    "llama": [("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), ("q_proj", "down_proj")],
    "llama biases": [("q_proj", "o_proj", "up_proj", "down_proj")],
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
