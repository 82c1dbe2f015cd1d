"""The phantom model, between the stages: TAC, LoRA and encoder learn to say what has changed, and nothing else.

Only one word in thirty of a report is about change. So TAC alone learns to write reports from the current image, and
never leaves that solution again. The encoder learns, too: stage 0 taught it what a report says about one image, and
small changes need more than that.

Run this after configs/phantom_align.py: python train.py configs/phantom_difference.py
"""

model = "runs/phantom_align/last"
train = ("lora", "connector", "encoder")
lora_r, lora_alpha, lora_dropout = 32, 64.0, 0.0  # dropout would take two fifths of the time
records = ("runs/hospital/data/every_pair/difference_train.jsonl",)
image_folder = "runs/hospital"
batch_size, micro_batch = 32, 16
max_steps, epochs = 6000, 4.0
lr = 2e-3
encoder_lr = 5e-4
beta2 = 0.98
warmup = 0.05
save_every = 500
log_every = 50
out_dir = "runs/phantom_difference"
