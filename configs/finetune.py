"""Everything but the encoder learns, in float32: for several large GPUs.

torchrun --nproc-per-node 8 train.py configs/finetune.py --records=findings_train.jsonl --image_folder=mimic-cxr-jpg
"""

model = "runs/align/last"
train = ("connector", "decoder")
epochs = 3.0
batch_size = 16
lr = 2e-5
mm_projector_lr = 2e-5
out_dir = "runs/finetune"
# estimate, not measured: 7 B parameters with gradients and optimizer are 112 GB in each process
micro_batch = 1
gradient_checkpointing = True
