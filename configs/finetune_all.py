"""Everything learns, the encoder too, at a rate of its own.

torchrun --nproc-per-node 8 train.py configs/finetune_all.py --records=findings_train.jsonl --image_folder=mimic-cxr-jpg

Estimate for 8 GPUs of 80 GB, not measured: what configs/finetune.py says, and of each GPU 1.4 GB for the encoder's 87
M of 16 bytes and 1.2 GB a row for its activations: 31 GB. Its work adds some 3 % to the time.
"""

model = "runs/align/last"
train = ("connector", "decoder", "encoder")
fsdp = True
epochs = 3.0
batch_size = 16
lr = 2e-5
mm_projector_lr = 2e-5
encoder_lr = 2e-6  # it has seen radiographs already
out_dir = "runs/finetune_all"
micro_batch = 2  # of one GPU
gradient_checkpointing = True
