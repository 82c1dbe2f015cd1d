"""The phantom model, stage 0: encoder, tokenizer and language model from nothing.

They learn whole findings from the current image alone, words of change included, as guesses: so a frozen language model
can say them later. python train.py configs/phantom_pretrain.py
"""

new_encoder = dict(
    image_size=96, patch_size=8, hidden_size=128, num_hidden_layers=4, num_attention_heads=4, mlp_ratio=3
)
new_decoder = dict(
    vocab_size=640, hidden_size=128, intermediate_size=352, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True,
)
connector, select_layer = "mlp2x_gelu", -1  # looks at the current image alone
template = "libra_v1"
train = ("connector", "decoder", "encoder")
records = ("hospital/data/findings_train.jsonl",)
validation = ("hospital/data/findings_validate.jsonl",)
image_folder = "hospital"
batch_size = micro_batch = 32
epochs = 4.0
lr = 1e-3
weight_decay = 0.05
beta2 = 0.98
warmup = 0.05
validate_every = 250
validation_records = 256
save_every = 250
log_every = 25
out_dir = "runs/phantom_pretrain"
