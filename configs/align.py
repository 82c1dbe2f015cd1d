"""Stage 1: the connector learns to speak to a frozen language model; the paper's recipe.

python train.py configs/align.py --records=diff_vqa_train.jsonl,cxr_vqa_train.jsonl --image_folder=mimic-cxr-jpg
"""

decoder = "epfl-llm/meditron-7b"
encoder = "microsoft/rad-dino"
template = "libra_v1"
train = ("connector",)
epochs = 1.0
batch_size = 16
lr = 2e-5
out_dir = "runs/align"
# estimate for one A100 of 80 GB, not measured: 13.5 GB of frozen 16-bit weights and some 8 GB a row of activations
micro_batch = 4
gradient_checkpointing = True
