"""Stage 1: the connector learns to speak to a frozen language model; the paper's recipe.

python train.py configs/align.py --records=diff_vqa_train.jsonl,cxr_vqa_train.jsonl --image_folder=mimic-cxr-jpg

Estimate for GPUs of 80 GB, not measured. Memory: 6.8 B frozen weights of 2 bytes, TAC's 62 M of 16, four rows of 1.3
GB: 20 GB. Time of 1.2 M records of 1,500 positions: forward, backward and forward again are 6 FLOP a weight and
position, so 7.3e19, at 40 % of the peak 160 hours of one A100 or 51 of one H100, a third where four records share a
prefix; divided by the GPUs that torchrun has.
"""

decoder = "epfl-llm/meditron-7b"
encoder = "microsoft/rad-dino"
template = "libra_v1"
train = ("connector",)
epochs = 1.0
batch_size = 16
lr = 2e-5
out_dir = "runs/align"
micro_batch = 4  # of one GPU
gradient_checkpointing = True  # without it a row takes some 9 GB
