"""Everything but the encoder learns, in float32, on several large GPUs.

torchrun --nproc-per-node 8 train.py configs/finetune.py --records=findings_train.jsonl --image_folder=mimic-cxr-jpg

Estimated, not measured, for 8 GPUs of 80 GB. A weight with its gradient and optimizer state takes 16 bytes. Each GPU
has an eighth of the layers' 6.5 B weights (13 GB) and all of the 0.26 B in embeddings and head and the connector's 62 M
(5 GB). With gathered layers, the update and two rows that is 27 GB, and 13 more during validation; loading takes 28.
Without fsdp it would be 112. The first process writes checkpoints of 82 GB and needs as much host memory. Time: 9 hours
on A100 or 3 on H100, at 40 % of their peak, for 127 k records of 1,500 positions, three times, at 8 FLOP per weight.
"""

model = "runs/align/last"
train = ("connector", "decoder")
fsdp = True
epochs = 3.0
batch_size = 16
lr = 2e-5
mm_projector_lr = 2e-5
out_dir = "runs/finetune"
micro_batch = 2  # rows on one GPU at a time
gradient_checkpointing = True
