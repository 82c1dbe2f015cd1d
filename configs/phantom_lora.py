"""The phantom model, stage 2: LoRA learns to write findings and still to say what has changed.

TAC and encoder keep learning.

Run this after configs/phantom_difference.py, whose result `make phantom` merges first:
python train.py configs/phantom_lora.py
"""

model = "runs/phantom_difference/merged"
train = ("lora", "connector", "encoder")
tac_dropout = 0.0
lora_r, lora_alpha, lora_dropout = 32, 64.0, 0.0  # dropout would take two fifths of the time
records = (
    "runs/hospital/data/findings_train.jsonl", "runs/hospital/data/findings_no_context_train.jsonl",
    "runs/hospital/data/difference_train.jsonl",
)
validation = ("runs/hospital/data/findings_validate.jsonl",)
image_folder = "runs/hospital"
batch_size, micro_batch = 128, 16  # a batch is about 48 rows
max_steps, epochs = 1500, 5.0
lr = 1.5e-3
encoder_lr = 5e-4
beta2 = 0.98
warmup = 0.05
validate_every = save_every = 250
log_every = 50
out_dir = "runs/phantom_lora"
