"""Everything learns, and the encoder has a learning rate of its own.

torchrun --nproc-per-node 8 train.py configs/finetune_all.py --records=findings_train.jsonl --image_folder=mimic-cxr-jpg

Estimated, not measured, for 8 GPUs of 80 GB: as configs/finetune.py, plus on each GPU 1.4 GB for the encoder's 87 M
weights and 1.2 GB a row for its activations, 31 GB together. The encoder adds some 3 % to the time.
"""

model = "runs/align/last"
train = ("connector", "decoder", "encoder")
fsdp = True
epochs = 3.0
batch_size = 16
lr = 2e-5
mm_projector_lr = 2e-5
encoder_lr = 2e-6  # it has learnt from radiographs already
out_dir = "runs/finetune_all"
micro_batch = 2  # rows on one GPU at a time
gradient_checkpointing = True
