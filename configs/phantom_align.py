"""The phantom model, stage 1: TAC from fresh weights, between a frozen encoder and a frozen language model.

python train.py configs/phantom_align.py, after configs/phantom_pretrain.py
"""

decoder = "runs/phantom_pretrain/last/parts/decoder"
encoder = "runs/phantom_pretrain/last/parts/encoder"
template = "libra_v1"
train = ("connector",)
records = ("hospital/data/findings_train.jsonl",)
validation = ("hospital/data/findings_validate.jsonl",)
image_folder = "hospital"
batch_size = micro_batch = 32
epochs = 3.0
lr = 2e-3
beta2 = 0.98
warmup = 0.05
validate_every = 250
validation_records = 256
save_every = 250
log_every = 25
out_dir = "runs/phantom_align"
