"""Everything but the encoder learns, in float32: for several large GPUs.

torchrun --nproc-per-node 8 train.py configs/finetune.py --records=findings_train.jsonl --image_folder=mimic-cxr-jpg

Estimate for 8 GPUs of 80 GB, not measured. Memory: weight, gradient and optimizer are 16 bytes; of 6.5 B in the
layers each GPU holds an eighth, 13 GB, of 0.26 B in embeddings and head and TAC's 62 M all, 5 GB; with gathered
layers, the update and two rows 27 GB, in a validation 13 more; 28 while loading. Without fsdp it would be 112. The
first process writes checkpoints of 82 GB, which pass through its host memory. Time of 127 k records of 1,500
positions, three times: 8 FLOP a weight, so 3.1e19, at 40 % of the peak 9 hours on A100 or 3 on H100.
"""

model = "runs/align/last"
train = ("connector", "decoder")
fsdp = True
epochs = 3.0
batch_size = 16
lr = 2e-5
mm_projector_lr = 2e-5
out_dir = "runs/finetune"
micro_batch = 2  # of one GPU
gradient_checkpointing = True
