"""A random checkpoint in the published layout, of a size to measure with.

    python tests/midsize.py DIR             write it
    python tests/midsize.py DIR --measure   write it, and print what loading and decoding cost (some 5 minutes)

ViT-B/14 at 518 px, TAC, Llama of 8 layers × 1024 with a vocabulary of 32,000: 267 M parameters, 1.07 GB in float32,
the decoder and connector in three shards. The tokenizer is the golden one, filled up with dummy tokens.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from decoder import Decoder, decoder_config  # noqa: E402
from encoder import Encoder, encoder_config  # noqa: E402
from tac import TAC  # noqa: E402

ENCODER = dict(
    model_type="dinov2", image_size=518, patch_size=14, hidden_size=768, num_hidden_layers=12, num_attention_heads=12,
    layer_norm_eps=1e-6,
)  # fmt: skip
PIXELS = dict(
    size={"shortest_edge": 518}, crop_size={"height": 518, "width": 518},
    image_mean=[0.5307] * 3, image_std=[0.2583] * 3,
)  # fmt: skip
DECODER = dict(
    model_type="libra", hidden_size=1024, num_hidden_layers=8, num_attention_heads=16, num_key_value_heads=16,
    intermediate_size=2816, vocab_size=32000, max_position_embeddings=4096, rms_norm_eps=1e-5,
    mm_vision_tower="../encoder", mm_projector_type="TAC", mm_vision_select_layer="all", image_aspect_ratio="pad",
    mm_use_im_patch_token=False, bos_token_id=1, eos_token_id=2, torch_dtype="float32",
)  # fmt: skip


def write(folder: Path, encoder: dict = ENCODER, decoder: dict = DECODER, shards: int = 3, dtype=torch.float32):
    """folder/encoder and folder/model; returns folder/model. Weights are normal with a spread of 0.02."""
    torch.manual_seed(0)
    (folder / "encoder").mkdir(parents=True)
    (folder / "model").mkdir()
    settings, sizes = encoder_config(encoder, folder), decoder_config(decoder, folder)
    with torch.device("meta"):
        parts = {
            "": Encoder(settings),
            "model.mm_projector.": TAC(settings.num_hidden_layers, settings.hidden_size, sizes.num_attention_heads,
                                       sizes.hidden_size),
            "model.": Decoder(sizes),
        }  # fmt: skip
    fill = lambda name, parameter: (
        torch.ones(parameter.shape, dtype=dtype)
        if "norm" in name and name.endswith("weight")
        else torch.randn(parameter.shape).mul_(0.02).to(dtype)
    )
    on_disk = {  # our parameter names -> DINOv2's on disk
        r"^patch_embed": "embeddings.patch_embeddings.projection", r"^class_token": "embeddings.cls_token",
        r"^position_embeddings": "embeddings.position_embeddings", r"^layers": "encoder.layer",
        r"\.(query|key|value)\.": r".attention.attention.\1.", r"\.out\.": ".attention.output.dense.",
        r"\.fc": ".mlp.fc", r"\.scale(.)": r".layer_scale\1.lambda1",
    }  # fmt: skip
    tensors = {}
    for name, parameter in parts[""].named_parameters():
        renamed = name
        for pattern, replacement in on_disk.items():
            renamed = re.sub(pattern, replacement, renamed)
        tensors[renamed] = fill(name, parameter)
    save_file(tensors, folder / "encoder" / "model.safetensors")
    names = [
        (prefix + name if name != "lm_head.weight" else name, parameter)
        for prefix in ("model.", "model.mm_projector.")
        for name, parameter in parts[prefix].named_parameters()
    ]
    weight_map, size, limit = {}, 0, sum(p.numel() for _, p in names) / shards
    files = [f"model-{n + 1:05}-of-{shards:05}.safetensors" for n in range(shards)]
    for name, parameter in names:
        weight_map[name] = files[min(int(size / limit), shards - 1)]
        size += parameter.numel()
    for file in files:
        held = {name: fill(name, parameter) for name, parameter in names if weight_map[name] == file}
        save_file(held, folder / "model" / file)
    (folder / "model" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "model" / "config.json").write_text(json.dumps(decoder))
    (folder / "encoder" / "config.json").write_text(json.dumps(encoder))
    (folder / "encoder" / "preprocessor_config.json").write_text(json.dumps(PIXELS))
    for file in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(HERE / "golden" / "libra-7b" / "model" / file, folder / "model")
    extra = {f"<extra_{id}>": id for id in range(700, decoder["vocab_size"])}
    (folder / "model" / "added_tokens.json").write_text(json.dumps(extra))
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
