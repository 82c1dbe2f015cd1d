"""The phantom model, stage 2: LoRA learns to say what has changed; TAC learns on beside it.

python train.py configs/phantom_lora.py, after configs/phantom_align.py
"""

model = "runs/phantom_align/last"
train = ("lora", "connector")
lora_r, lora_alpha, lora_dropout = 32, 64.0, 0.05
records = ("hospital/data/findings_train.jsonl",)
validation = ("hospital/data/findings_validate.jsonl",)
image_folder = "hospital"
batch_size = micro_batch = 32
epochs = 4.0
lr = 2e-3
mm_projector_lr = 1e-3
beta2 = 0.98
warmup = 0.05
validate_every = 250
validation_records = 256
save_every = 250
log_every = 25
out_dir = "runs/phantom_lora"
