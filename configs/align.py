"""Stage 1, the paper's recipe: the connector learns to speak to a frozen language model.

python train.py configs/align.py --records=diff_vqa_train.jsonl,cxr_vqa_train.jsonl --image_folder=mimic-cxr-jpg

Estimated, not measured, for GPUs of 80 GB. Memory: 20 GB, of which 6.8 B frozen weights take 2 bytes each, the
connector's 62 M take 16, and each of four rows 1.3 GB. Time: 160 hours on one A100 or 51 on one H100, at 40 % of their
peak, for 1.2 M records of 1,500 positions at 6 FLOP per weight and position (forward, backward, and forward again).
Four records behind one prefix take a third of that; several GPUs divide it.
"""

decoder = "epfl-llm/meditron-7b"
encoder = "microsoft/rad-dino"
template = "libra_v1"
train = ("connector",)
epochs = 1.0
batch_size = 16
lr = 2e-5
out_dir = "runs/align"
micro_batch = 4  # rows on one GPU at a time
gradient_checkpointing = True  # without it a row takes about 9 GB
