"""Stage 2: LoRA learns to write findings; encoder and connector are frozen; the paper's recipe.

python train.py configs/finetune_lora.py --records=findings_train.jsonl --image_folder=mimic-cxr-jpg

Estimate for GPUs of 80 GB, not measured. Memory: 6.9 B frozen weights of 2 bytes, LoRA's 320 M of 16, four rows of
1.4 GB: 25 GB. Time of 127 k records of 1,500 positions, three times: 6 FLOP a weight and 8 of LoRA's, so 2.5e19, at
40 % of the peak 56 hours of one A100 or 18 of one H100, divided by the GPUs that torchrun has.
"""

model = "runs/align/last"  # what stage 1 left; or a connector's file with base
train = ("lora",)
lora_r, lora_alpha, lora_dropout = 128, 256.0, 0.05  # beside all seven projections
epochs = 3.0
batch_size = 16
lr = 2e-5
out_dir = "runs/finetune_lora"
micro_batch = 4  # of one GPU
gradient_checkpointing = True
