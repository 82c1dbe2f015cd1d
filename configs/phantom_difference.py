"""The phantom model, stage 1: a fresh TAC, LoRA and the encoder learn to say what has changed, and nothing else.

Only one word in thirty of a report is about change. A TAC that first learns reports writes them from the current image,
and never leaves that solution again. The encoder learns, too: stage 0 taught it what a report says about one image, and
small changes need more than that.

Run this after configs/phantom_pretrain.py: python train.py configs/phantom_difference.py
"""

decoder = "runs/phantom_pretrain/last/parts/decoder"
encoder = "runs/phantom_pretrain/last/parts/encoder"
template = "libra_v1"
train = ("lora", "connector", "encoder")
# with torch's initial values TAC sees little: docs/phantom.md, "What TAC needs to start"
tac_layer_mean, tac_same_place, tac_shallow, tac_dropout = 0.15, 4.0, True, 0.0
lora_r, lora_alpha, lora_dropout = 32, 64.0, 0.0  # dropout would take two fifths of the time
records = ("runs/hospital/data/every_pair/difference_train.jsonl",)
validation, validation_records = ("runs/hospital/data/difference_validate.jsonl",), 512
image_folder = "runs/hospital"
batch_size, micro_batch = 32, 16
max_steps, epochs = 6800, 4.0
lr = 2e-3
encoder_lr = 5e-4
beta2 = 0.98
warmup = 0.05
validate_every = save_every = 500
log_every = 50
out_dir = "runs/phantom_difference"
