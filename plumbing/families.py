"""Which decoder a config.json describes: its family, a row of `decoder.FAMILIES`, and all fields, checked."""

from typing import Annotated

from decoder import FAMILIES, DecoderConfig
from plumbing.checkpoint import NameMap
from plumbing.fields import Range, check_fields, check_present, check_value, misfit, shorten, warn_of_training

# rope type -> the fields that it needs
ROPE_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
}
# what training of `transformers` drops at random; here LoRA alone has dropout
DROPOUTS = ("attention_dropout", "resid_pdrop", "embd_pdrop")


# other names of the same layouts: Libra's, and those of LLaVA and of LLaVA-Med
ALIASES = {"libra": "llama", "llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral"}

# models in a layout of their own -> where the same model is in Libra's
ELSEWHERE = {
    "maira2": "X-iZhang/libra-maira-2",
    "llava": "the original repository, whose config.json has mm_vision_tower",
}


def family_of(config: dict) -> str | None:
    """The key in FAMILIES for a parsed config.json, of a published Libra, of a LLaVA or of a stock model."""
    model_type = str(config.get("model_type"))
    return ALIASES.get(model_type, model_type.removeprefix("libra_"))


def check_family(config: dict, where):
    """ValueError, which says what a parsed config.json describes, if this program does not compute that."""
    model_type = config.get("model_type")
    # `transformers` describes a model with images in two configs inside one
    if isinstance(config.get("text_config"), dict):
        repository = ELSEWHERE.get(str(model_type), "a model in the layout of Libra or LLaVA")
        problem = f"model_type {model_type!r} with a text_config is the layout that transformers has for this model"
        raise ValueError(f"{where}: {problem}, which is not supported: use {repository}")
    if family_of(config) not in FAMILIES:
        ours = [f"libra_{name}" for name in FAMILIES if name != "llama"]
        known = ", ".join([*ALIASES, *ours, *FAMILIES])
        raise ValueError(f"{where}: model_type {model_type!r} is not one of {known}")
    # packed weights are numbers of another kind, or need scales
    packed = config.get("quantization_config")
    if packed:
        method = isinstance(packed, dict) and packed.get("quant_method")
        problem = f"quantization_config: weights packed by {method or shorten(packed)} are not supported"
        raise ValueError(f"{where}: {problem}: use the model's 16-bit version")


def names_of(config: dict) -> NameMap:
    """How the family of a parsed config.json names its parameters on disk."""
    return FAMILIES[family_of(config)].names


def decoder_config(config: dict, source) -> DecoderConfig:
    """Reads a parsed config.json. ValueError names the field whose value is not supported."""
    where = f"{source}/config.json"
    check_family(config, where)
    family = FAMILIES[family_of(config)]

    # 1) what the family reads, in its types and bounds; the file wins over the defaults
    values = {name: family.meaning(name, config.get(name, value)) for name, value in family.defaults.items()}
    missing = [name for name in ("num_key_value_heads", "head_dim") if values[name] is None]
    values = {name: value for name, value in values.items() if name not in missing}
    values = check_fields(values, DecoderConfig, where)

    # 2) refuse what we would compute differently
    check_present(config, family.supported, where)
    warn_of_training(config, DROPOUTS, where)

    # 3) fields that may be absent or null
    heads, hidden_size = values["num_attention_heads"], values["hidden_size"]
    values.setdefault("num_key_value_heads", heads)
    if "head_dim" in missing:
        if hidden_size % heads:
            raise misfit(heads, "num_attention_heads", where, f"a divisor of hidden_size {hidden_size}")
        values["head_dim"] = check_value(hidden_size // heads, Annotated[int, Range(2, 4096)], "head_dim", where)
    if not values.get("use_sliding_window", True):
        values["sliding_window"] = None

    values |= rope_settings(config, values, where)
    result = DecoderConfig(**values, **family.switches)
    check_sizes(result, where)
    return result


def rope_settings(config: dict, values: dict, where: str) -> dict:
    """The fields of DecoderConfig about rotary embeddings, from what a file nests in `rope_scaling`.

    `transformers` 5 renamed `rope_scaling` to `rope_parameters` and moved three fields into it; where a file has both,
    the old name counts.
    """
    name = "rope_parameters" if config.get("rope_scaling") in (None, {}) else "rope_scaling"
    scaling = check_value(config.get(name), dict | None, name, where) or {}
    where = f"{where}: {name}"
    for key, value in scaling.items():
        if isinstance(value, dict):
            raise misfit(value, shorten(key), where, "no settings for single kinds of layers")

    # 1) the type, under its two names, and what the family allows
    family = FAMILIES[family_of(config)]
    rope_type = scaling.get("rope_type", scaling.get("type", "default"))
    scaling = scaling | {"rope_type": family.meaning("rope_type", rope_type)}
    for key in family.supported.keys() & scaling.keys():
        check_value(scaling[key], family.supported[key], key, where)

    # 2) types and bounds. What a file has inside wins over what it has outside, but for the original length
    known = {"rope_type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings", "attention_factor"}
    known |= {"factor", "low_freq_factor", "high_freq_factor", "short_factor", "long_factor"}
    settings = check_fields({key: scaling[key] for key in known & scaling.keys()}, DecoderConfig, where)
    outside = values["original_max_position_embeddings"]
    inside = settings.get("original_max_position_embeddings")
    settings["original_max_position_embeddings"] = outside or inside or values["max_position_embeddings"]

    # 3) what the type needs
    missing = [key for key in ROPE_FIELDS[settings["rope_type"]] if settings.get(key) is None]
    if missing:
        raise ValueError(f"{where} of type {rope_type!r} lacks {', '.join(missing)}")
    return settings


def check_sizes(config: DecoderConfig, where: str):
    """ValueError if fields that are fine alone do not fit each other."""
    heads, layers, rotated = config.num_attention_heads, config.num_hidden_layers, config.rotated
    if heads % config.num_key_value_heads:
        raise misfit(config.num_key_value_heads, "num_key_value_heads", where, f"a divisor of {heads} heads")
    if rotated > config.head_dim:
        raise misfit(config.head_dim, "head_dim", where, "an even number")
    if rotated == 0:
        raise misfit(config.partial_rotary_factor, "partial_rotary_factor", where, "enough for one channel of a head")

    # layers with a window
    kinds = config.layer_types
    if kinds is not None and len(kinds) != layers:
        raise misfit(kinds, "layer_types", where, f"one for each of {layers} layers")
    if kinds and "sliding_attention" in kinds and config.sliding_window is None:
        raise misfit(kinds, "layer_types", where, "no 'sliding_attention' where use_sliding_window is false")

    # rotary scaling
    if config.rope_type == "llama3" and config.high_freq_factor <= config.low_freq_factor:
        raise misfit(config.high_freq_factor, "high_freq_factor", where, "more than low_freq_factor")
    for name in ("short_factor", "long_factor"):
        factors = getattr(config, name)
        if config.rope_type == "longrope" and len(factors) != rotated // 2:
            raise misfit(factors, name, where, f"{rotated // 2} numbers, one for each pair of rotated channels")
