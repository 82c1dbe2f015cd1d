"""Prints where TAC's cross-attention looks: its share on the same place of the prior, and on the 3 × 3 places around.

    python assets/same_place.py --model MODEL --questions questions.jsonl --image-folder DIR

The mean over heads, places and the first studies with a prior, and what it would be without any preference. See "What
TAC needs to start" in docs/phantom.md. A model whose TAC is fresh comes from `train.py configs/align.py --max_steps=1
--lr=0`.
"""

import argparse
import math
import sys
from pathlib import Path

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

from data import Question, Records
from model import Libra
from plumbing.image import load_image


def weights_of(module, query, source):
    """The attention weights [B, H, N, N + 1] of a `BiasKVAttention`; the last column is the learned key's."""
    weight_q, weight_k, _ = module.in_proj_weight.chunk(3)
    bias_q, bias_k, _ = module.in_proj_bias.chunk(3)
    q = F.linear(query, weight_q, bias_q)  # [B, N, C]
    k = F.linear(source, weight_k, bias_k)
    k = torch.cat((k, module.bias_k.expand(len(k), -1, -1)), dim=1)  # [B, N + 1, C]
    q, k = module.split_heads(q), module.split_heads(k)  # [B, H, …, D]
    return (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)


def near(places: int):
    """[N, N]: whether place j is one of the 3 × 3 around place i, in a square of N places."""
    side = math.isqrt(places)
    rows, columns = torch.arange(places) // side, torch.arange(places) % side
    return ((rows[:, None] - rows).abs() <= 1) & ((columns[:, None] - columns).abs() <= 1)


@torch.inference_mode()
def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("model", "questions", "image-folder"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--studies", type=int, default=256)
    arguments = parser.parse_args()

    libra = Libra.from_pretrained(arguments.model)
    connector, seen = libra.connector, []
    connector.cros_attention.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    questions = (Question.parse(raw) for raw in Records(arguments.questions))
    paired = [question for question in questions if len(question.images) == 2][: arguments.studies]
    same, around = [], []
    for question in paired:
        images = [load_image(Path(arguments.image_folder, name)) for name in question.images]
        libra.embed_images(libra.preprocess(images))
        weights = weights_of(connector.cros_attention, *seen.pop())[0, ..., :-1].float()  # [H, N, N]
        same.append(weights.diagonal(dim1=1, dim2=2).mean())
        around.append((weights * near(weights.shape[-1]).to(weights.device)).sum(-1).mean())
    # without a preference, each of the N places and the learned key has the same share
    places = weights.shape[-1]
    uniform = 1 / (places + 1)
    rows = [("same place", same, uniform), ("3 x 3 around", around, uniform * near(places).sum() / places)]
    print(f"{len(paired)} studies")
    for name, shares, expected in rows:
        print(f"{name}: {100 * torch.stack(shares).mean():.2f} %, without a preference {100 * expected:.2f} %")


if __name__ == "__main__":
    main()
