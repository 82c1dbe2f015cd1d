"""The phantom model, stage 0: encoder, tokenizer and language model learn from fresh weights.

They learn whole findings from the current image alone. Words of change can only be guessed then, but a language model
that has learnt them can use them when it is frozen. Short answers about the same studies teach the encoder several
times faster than reports alone.

Run this after the hospital is drawn, as `make phantom` does: python train.py configs/phantom_pretrain.py
"""

import os

_hospital = f"runs/{os.environ.get('HOSPITAL', 'hospital')}"  # `make ablation HOSPITAL=aligned` takes another

new_encoder = dict(
    image_size=96, patch_size=12, hidden_size=96, num_hidden_layers=4, num_attention_heads=4, mlp_ratio=3
)
new_decoder = dict(
    vocab_size=1024, hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True,
)
connector, select_layer = "mlp2x_gelu", -1  # reads the current image alone
template = "libra_v1"
train = ("connector", "decoder", "encoder")
records = (f"{_hospital}/data/findings_train.jsonl", f"{_hospital}/data/diff_vqa_train.jsonl")
validation = (f"{_hospital}/data/findings_validate.jsonl",)
image_folder = _hospital
batch_size, max_shared, micro_batch = 256, 12, 16  # a batch is about 46 rows
epochs = 6.0
lr = 1.5e-3
weight_decay = 0.05
beta2 = 0.98
warmup = 0.05
validate_every = save_every = 250
log_every = 50
out_dir = "runs/phantom_pretrain"
