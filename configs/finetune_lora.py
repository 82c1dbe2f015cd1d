"""Stage 2, the paper's recipe: LoRA learns to write findings; encoder and connector are frozen.

python train.py configs/finetune_lora.py --records=findings_train.jsonl --image_folder=mimic-cxr-jpg

Estimated, not measured, for GPUs of 80 GB. Memory: 25 GB, of which 6.9 B frozen weights take 2 bytes each, LoRA's 320 M
take 16, and each of four rows 1.4 GB. Time: 56 hours on one A100 or 18 on one H100, at 40 % of their peak, for 127 k
records of 1,500 positions, three times, at 6 FLOP per frozen weight and 8 per LoRA weight. Several GPUs divide it.
"""

model = "runs/align/last"  # what stage 1 wrote; or a connector's file, together with base
train = ("lora",)
lora_r, lora_alpha, lora_dropout = 128, 256.0, 0.05  # beside all seven projections
epochs = 3.0
batch_size = 16
lr = 2e-5
out_dir = "runs/finetune_lora"
micro_batch = 4  # rows on one GPU at a time
gradient_checkpointing = True
