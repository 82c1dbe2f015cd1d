"""Stage 2: LoRA learns to write findings; encoder and connector are frozen; the paper's recipe.

python train.py configs/finetune_lora.py --records=findings_train.jsonl --image_folder=mimic-cxr-jpg
"""

model = "runs/align/last"  # what stage 1 left; or a connector's file with base
train = ("lora",)
lora_r, lora_alpha, lora_dropout = 128, 256.0, 0.05  # beside all seven projections
epochs = 3.0
batch_size = 16
lr = 2e-5
out_dir = "runs/finetune_lora"
# estimate for one A100 of 80 GB, not measured: 13.5 GB of frozen weights, 5.1 GB of LoRA with its optimizer
micro_batch = 4
gradient_checkpointing = True
