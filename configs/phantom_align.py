"""The phantom model, stage 1: a fresh TAC learns between a frozen encoder and a frozen language model.

Run this after configs/phantom_pretrain.py: python train.py configs/phantom_align.py
"""

decoder = "runs/phantom_pretrain/last/parts/decoder"
encoder = "runs/phantom_pretrain/last/parts/encoder"
template = "libra_v1"
train = ("connector",)
tac_layer_mean, tac_shallow = 0.15, True  # torch's initial values let TAC see little, and with some seeds nothing
records = ("runs/hospital/data/findings_train.jsonl", "runs/hospital/data/diff_vqa_train.jsonl")
validation = ("runs/hospital/data/findings_validate.jsonl",)
image_folder = "runs/hospital"
batch_size, max_shared, micro_batch = 256, 12, 16  # a batch is about 46 rows
max_steps = 450  # 0.9 passes over the records
lr = 2e-3
beta2 = 0.98  # 0.999 averages over more steps than the run has
warmup = 0.05
validate_every = save_every = 250
log_every = 50
out_dir = "runs/phantom_align"
