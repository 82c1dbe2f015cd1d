"""The phantom model, stage 2 once more, for the scores were still rising: also asked without clinical context.

python train.py configs/phantom_more.py, after configs/phantom_lora.py was merged as `make phantom` does
"""

model = "runs/phantom_lora/merged"
train = ("lora", "connector")
lora_r, lora_alpha, lora_dropout = 32, 64.0, 0.05
records = (
    "runs/hospital/data/findings_train.jsonl", "runs/hospital/data/findings_no_context_train.jsonl",
    "runs/hospital/data/difference_train.jsonl",
)
validation = ("runs/hospital/data/findings_validate.jsonl",)
image_folder = "runs/hospital"
batch_size, micro_batch = 64, 16
max_steps = 620  # 0.6 passes
lr = 1.5e-3
beta2 = 0.98
warmup = 0.05
validate_every = save_every = 250
log_every = 50
out_dir = "runs/phantom_more"
