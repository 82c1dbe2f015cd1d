"""What the work costs on paper: multiplications, bytes, and from them hours on a GPU that one may rent.

`bench.py` divides what it measured by these; `python bench.py plan` prints `plan`.
"""

from decoder import DecoderConfig
from encoder import EncoderConfig

PREFIX, QUESTION, ANSWER = 40, 38, 79  # ids of a training record before its image and behind, as in Diff-VQA
PROMPT = 62  # ids of the published prompt
RANK = 128  # of LoRA, as published


def patches(config: EncoderConfig) -> int:
    return (config.image_size // config.patch_size) ** 2


def encoder_parameters(config: EncoderConfig) -> int:
    """Of all its layers, without norms and biases."""
    return config.num_hidden_layers * (4 * config.hidden_size**2 + 2 * config.hidden_size * config.intermediate_size)


def encoder_flops(config: EncoderConfig, images: int) -> int:
    """Multiplications and additions, each counted."""
    N, C = patches(config) + config.class_token, config.hidden_size
    attended = 4 * config.num_hidden_layers * N * N * C
    embedded = 2 * patches(config) * 3 * config.patch_size**2 * C
    return images * (2 * N * encoder_parameters(config) + attended + embedded)


def connector_parameters(config: EncoderConfig, hidden: int) -> int:
    """TAC's, without norms and biases: three attentions, two MLPs."""
    C = config.hidden_size
    return 3 * 4 * C * C + 2 * C * C + C * hidden + 3 * hidden * hidden


def connector_flops(config: EncoderConfig, hidden: int) -> int:
    """Of one pair; the layerwise extractor is a matter of bytes."""
    N = patches(config)
    return 2 * N * connector_parameters(config, hidden) + 3 * 4 * N * N * config.hidden_size


def layer_parameters(config: DecoderConfig) -> int:
    """Of all the decoder's layers, without norms and biases."""
    C, heads = config.hidden_size, 2 * config.num_attention_heads + 2 * config.num_key_value_heads
    return config.num_hidden_layers * (C * config.head_dim * heads + 3 * C * config.intermediate_size)


def mixing_flops(config: DecoderConfig, pairs: float) -> float:
    """Attention's, of this many pairs of a position and one that it sees."""
    return 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * pairs


def prefill_flops(config: DecoderConfig, positions: int) -> float:
    head = 2 * config.vocab_size * config.hidden_size
    return 2 * positions * layer_parameters(config) + mixing_flops(config, positions**2 / 2) + head


def lora_parameters(config: DecoderConfig) -> int:
    """Of LoRA beside all seven projections."""
    C, heads = config.hidden_size, 2 * config.num_attention_heads + 2 * config.num_key_value_heads
    widths = 4 * C + config.head_dim * heads + 3 * (C + config.intermediate_size)
    return config.num_hidden_layers * RANK * widths


def step_flops(encoder: EncoderConfig, decoder: DecoderConfig, rows: int, questions: int, lora: bool) -> float:
    """A training step's: forward, and through the decoder back to what learns; its own weights get no gradients.

    questions: of each row, about its pair of images and behind one prefix.
    """
    prefix, text = patches(encoder) + PREFIX, QUESTION + ANSWER
    positions = prefix + questions * text
    head = questions * ANSWER * decoder.vocab_size * decoder.hidden_size
    linear = 2 * (positions * layer_parameters(decoder) + head)
    mixing = mixing_flops(decoder, prefix**2 / 2 + questions * (text * prefix + text**2 / 2))
    tac = connector_flops(encoder, decoder.hidden_size) * (1 if lora else 3)
    adapter = 6 * positions * lora_parameters(decoder) if lora else 0
    return rows * (encoder_flops(encoder, 2) + tac + 2 * linear + 3 * mixing + adapter)


def kept_bytes(config: DecoderConfig, lora: bool) -> int:
    """What a position leaves in a layer for the backward pass, in 16 bits where autocast has it so.

    Two norms' inputs, in float32; q, k, v and what attention gives; gate and up. LoRA keeps its inputs: those of q, k
    and v, of o, of gate and up, of down; and what its first matrices give.
    """
    C, hidden = config.hidden_size, config.intermediate_size
    q, kv = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    kept = 8 * C + 2 * (2 * q + 2 * kv) + 2 * 2 * hidden
    return kept + (2 * (C + q + C + hidden) + 2 * 7 * RANK if lora else 0)


def decoder_parameters(config: DecoderConfig) -> int:
    tables = 1 if config.tie_word_embeddings else 2
    return layer_parameters(config) + tables * config.vocab_size * config.hidden_size


# ------------------------------------------------------------------------------------------ plans

GPUS = {  # dense FLOP/s in bfloat16, bytes of memory, bytes/s: makers' data sheets
    "A100": (312e12, 80e9, 2.04e12), "A100-40": (312e12, 40e9, 1.56e12), "H100": (989e12, 80e9, 3.35e12),
    "H200": (989e12, 141e9, 4.8e12), "B200": (2250e12, 180e9, 7.7e12), "L40S": (362e12, 48e9, 0.864e12),
    "A6000": (155e12, 48e9, 0.768e12), "3090": (71e12, 24e9, 0.936e12), "4090": (165e12, 24e9, 1.01e12),
    "5090": (210e12, 32e9, 1.79e12), "MI300X": (1307e12, 192e9, 5.3e12),
}  # fmt: skip
LLAMA_3 = dict(model_type="llama", num_key_value_heads=8, vocab_size=128256)
MODELS = {  # of published language models, the fields of config.json that decide what they cost
    "7b": dict(model_type="llama"),  # Llama 2, Vicuna, Meditron: our defaults
    "3b": LLAMA_3 | dict(hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24,
                         head_dim=128, tie_word_embeddings=True),
    "8b": LLAMA_3 | dict(intermediate_size=14336),
    "mistral-7b": dict(model_type="mistral"),
}  # fmt: skip

COMPUTES, READS = 0.4, 0.6  # the shares of a GPU's FLOP/s and bytes/s that we assume
TEST_SET, REPORT, TOGETHER = 2461, 120, 8  # studies of the published test set, tokens of a report, studies of a batch
GB, TFLOP, HOUR = ("GB", 1e9), ("TFLOP", 1e12), ("h", 3600)


def plan(encoder: EncoderConfig, decoder: DecoderConfig, gpu: str, gpus: int, rows: int, questions: int, records: int):
    """{part: [(term, bytes or FLOP or seconds, (unit, scale), how)]} of both stages and of the test set.

    rows: in a forward pass of one GPU; questions: about each pair in stage 1; records: of one pass.
    """
    speed, memory, rate = GPUS[gpu]
    computing = f"{COMPUTES:.0%} of {gpus} × {speed / 1e12:,.0f} TFLOP/s"
    weights = decoder_parameters(decoder) + encoder_parameters(encoder)
    tac = connector_parameters(encoder, decoder.hidden_size)
    layers = decoder.num_hidden_layers

    def sum_of(name: str, *terms: float):
        verdict = "fits" if sum(terms) < 0.92 * memory else "does not fit"  # something goes to the allocator's gaps
        return name, sum(terms), GB, f"{verdict} {memory / 1e9:.0f} GB"

    found = {}
    for stage, learnt, asked in (("stage 1, TAC", tac, questions), ("stage 2, LoRA", lora_parameters(decoder), 1)):
        lora = stage.endswith("LoRA")
        frozen, learning = 2 * (weights + lora * tac), 16 * learnt
        kept, positions = kept_bytes(decoder, lora), patches(encoder) + PREFIX + asked * (QUESTION + ANSWER)
        activations = rows * positions * layers * kept
        inputs = rows * positions * (layers * 2 * decoder.hidden_size + kept)  # of each layer, and one layer's
        work = step_flops(encoder, decoder, 1, asked, lora)
        seconds = records / asked * work / (COMPUTES * speed * gpus)
        found[f"{stage}: {asked} question(s) about each pair in a row"] = [
            ("frozen weights", frozen, GB, "2 bytes each"),
            ("what learns", learning, GB, f"{learnt / 1e6:.0f} M × 16 bytes: weights, gradients, AdamW in float32"),
            ("activations", activations, GB, f"{rows} × {positions:,} positions × {layers} layers × {kept:,} bytes"),
            sum_of("memory", frozen, learning, activations),
            sum_of("… with checkpointing", frozen, learning, inputs),
            ("work", work, TFLOP, "a row; with checkpointing a third more, and a third more time"),
            ("time", seconds, HOUR, f"{records:,} records once, {computing}"),
        ]  # fmt: skip
    prompt, a_position = patches(encoder) + PROMPT, 2 * 2 * layers * decoder.num_key_value_heads * decoder.head_dim
    reading = encoder_flops(encoder, 2) + connector_flops(encoder, decoder.hidden_size) + prefill_flops(decoder, prompt)
    first = TEST_SET * reading / (COMPUTES * speed * gpus)
    for beams in (1, 10):
        held, cache = 2 * (weights + tac), TOGETHER * (prompt + beams * REPORT) * a_position
        token = 2 * (layer_parameters(decoder) + decoder.vocab_size * decoder.hidden_size)
        token += TOGETHER * (prompt + beams * REPORT / 2) * a_position
        then = TEST_SET / TOGETHER * REPORT * token / (READS * rate * gpus)
        held_positions = f"{TOGETHER} × ({prompt:,} + {beams} × {REPORT}) positions"
        found[f"{TEST_SET:,} studies, {beams} beam(s), {REPORT} tokens, {TOGETHER} together"] = [
            ("weights", held, GB, "2 bytes each"),
            ("keys and values", cache, GB, f"{held_positions} × {a_position:,} bytes"),
            sum_of("memory", held, cache),
            ("before the first token", reading, TFLOP, "a study: encoder, TAC, prefill"),
            ("time", first, HOUR, computing),
            ("read for a token", token, GB, f"weights, and keys and values of {TOGETHER} studies half-way"),
            ("time", then, HOUR, f"{READS:.0%} of {gpus} × {rate / 1e12:.2f} TB/s"),
            ("time in all", first + then, HOUR, ""),
        ]  # fmt: skip
    return found
