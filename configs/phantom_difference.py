"""The phantom model, between the stages: TAC and LoRA learn to say what has changed, and nothing else.

Only one word in thirty of a report is about change. So TAC alone learns to write reports from the current image, and
never leaves that solution again.

Run this after configs/phantom_align.py: python train.py configs/phantom_difference.py
"""

model = "runs/phantom_align/last"
train = ("lora", "connector")
lora_r, lora_alpha, lora_dropout = 32, 64.0, 0.0  # dropout would take two fifths of the time
records = ("runs/hospital/data/difference_train.jsonl",)
image_folder = "runs/hospital"
batch_size, micro_batch = 32, 16
max_steps, epochs = 4000, 9.0
lr = 2e-3
beta2 = 0.98
warmup = 0.05
save_every = 500
log_every = 50
out_dir = "runs/phantom_difference"
