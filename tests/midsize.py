"""A random checkpoint in the published layout, of a size to measure with.

    python tests/midsize.py DIR             write it
    python tests/midsize.py DIR --measure   write it, and print what loading and decoding cost (some 5 minutes)

ViT-B/14 at 518 px, TAC, Llama of 8 layers × 1024 with a vocabulary of 32,000: 267 M parameters, 1.07 GB in float32,
the decoder and connector in three shards. The tokenizer is the golden one, filled up with dummy tokens.
"""

import argparse
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from PIL import Image

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import checkpoint  # noqa: E402
import parts  # noqa: E402
from decoder import Decoder, decoder_config  # noqa: E402
from encoder import encoder_config  # noqa: E402
from tac import make_connector  # noqa: E402

ENCODER = dict(
    model_type="dinov2", image_size=518, patch_size=14, hidden_size=768, num_hidden_layers=12, num_attention_heads=12,
    layer_norm_eps=1e-6,
)  # fmt: skip
DECODER = dict(
    model_type="libra", hidden_size=1024, num_hidden_layers=8, num_attention_heads=16, num_key_value_heads=16,
    intermediate_size=2816, vocab_size=32000, max_position_embeddings=4096, rms_norm_eps=1e-5,
    mm_vision_tower="../encoder", mm_projector_type="TAC", mm_vision_select_layer="all", image_aspect_ratio="pad",
    mm_use_im_patch_token=False, bos_token_id=1, eos_token_id=2, torch_dtype="float32",
)  # fmt: skip


def write(folder: Path, encoder: dict = ENCODER, decoder: dict = DECODER, shards: int = 3):
    """folder/encoder and folder/model, in float32; returns folder/model."""
    parts.write_encoder(folder / "encoder", encoder, mean=0.5307, std=0.2583)
    settings, sizes = encoder_config(encoder, folder, {}), decoder_config(decoder, folder)
    model = {"model.": Decoder(sizes), "model.mm_projector.": make_connector(
        "TAC", settings.num_hidden_layers, settings.hidden_size, sizes.num_attention_heads, sizes.hidden_size
    )}  # fmt: skip
    for module in model.values():
        parts.draw(module, seed=0)
    names = lambda prefix, name: name if name == "lm_head.weight" else prefix + name
    tensors = [(names(prefix, name), p) for prefix, module in model.items() for name, p in module.named_parameters()]
    with checkpoint.atomic_folder(folder / "model") as partial:
        checkpoint.write_json(partial / "config.json", decoder)
        checkpoint.write_tensors(partial, tensors, round(1.1 * sum(tensor.nbytes for _, tensor in tensors) / shards))
        for file in ("tokenizer.model", "tokenizer_config.json"):
            shutil.copy(HERE / "golden" / "libra-7b" / "model" / file, partial)
        extra = {f"<extra_{id}>": id for id in range(700, decoder["vocab_size"])}
        checkpoint.write_json(partial / "added_tokens.json", extra)
    return folder / "model"


def measure(folder: Path, beams: int, runs: int = 3):
    """In a fresh process: load, then write 64 tokens, `runs` times; print the memory and the median time."""
    from data import Study
    from model import Libra
    from sample import generate

    resident = lambda field: int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024
    before = resident("VmRSS")
    libra = Libra.from_pretrained(folder / "model", device="cpu", dtype="float32")
    weights = sum(parameter.numel() * parameter.element_size() for parameter in libra.parameters()) / 2**20
    grown = resident("VmHWM") - before
    print(f"load: {weights:.0f} MiB of weights, resident memory grew by {grown:.0f} MiB at the peak")
    libra.eos_token_ids = []
    noise = lambda seed: Image.effect_noise((1000, 1200), 60 + seed).convert("RGB")
    study, seconds = Study(noise(0), noise(1)), []
    for _ in range(runs):
        begin = time.perf_counter()
        generate(libra, study, num_beams=beams, max_new_tokens=64)
        seconds.append(time.perf_counter() - begin)
    median, peak = sorted(seconds)[runs // 2], resident("VmHWM")
    print(f"{beams} x 64 tokens: {median:.2f} s (median of {runs}), peak {peak:.0f} MiB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--beams", type=int, help="measure this many beams, in this process")
    arguments = parser.parse_args()
    if arguments.beams:
        measure(arguments.folder, arguments.beams)
    else:
        print(write(arguments.folder))
        for beams in ("1", "10") if arguments.measure else ():
            subprocess.run([sys.executable, __file__, arguments.folder, "--beams", beams], check=True)
