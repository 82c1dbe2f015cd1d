PYTHON ?= python3
PIP = .venv/bin/pip install --quiet --disable-pip-version-check

.PHONY: demo test test-long test-kernel phantom

# a report on a drawn patient beside the previous image, and the same with the two images exchanged
demo: .venv/ready
	.venv/bin/python sample.py --model assets/phantom --images assets/current.png assets/prior.png --max-new-tokens 200
	.venv/bin/python sample.py --model assets/phantom --images assets/prior.png assets/current.png --max-new-tokens 200

test: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/python -m pytest

# the proofs that take long: many kills of training, of the image cache and of answering
test-long: .venv/installed
	KILLS=30 .venv/bin/python -m pytest tests/test_train.py -k killed
	KILLS=20 .venv/bin/python -m pytest tests/test_cache.py -k killed
	.venv/bin/python tests/test_answer.py 10

# the fused kernel compiled for every target, head size and type, without a GPU
test-kernel: .venv/installed
	.venv/bin/python tests/kernel_compile.py

# a hospital is drawn, a model learns it from nothing in four runs, and its scores are printed: runs/phantom
TRAIN = OMP_NUM_THREADS=1 .venv/bin/torchrun --nproc-per-node 2 train.py configs/$(1).py $(if $(wildcard runs/$(1)/checkpoints/*.pt),--resume)
phantom: .venv/ready
	.venv/bin/python prepare.py phantom --out runs/hospital --patients 10000 --size 96
	.venv/bin/python prepare.py mimic-cxr --root runs/hospital --out runs/hospital/data --section findings
	.venv/bin/python prepare.py mimic-cxr --root runs/hospital --out runs/hospital/data --section findings --no-context
	.venv/bin/python prepare.py diff-vqa --root runs/hospital --questions runs/hospital/mimic_pair_questions.csv --out runs/hospital/data
	.venv/bin/python prepare.py diff-vqa --root runs/hospital --questions runs/hospital/mimic_pair_questions.csv --type difference --out runs/hospital/data
	$(call TRAIN,phantom_pretrain)
	$(call TRAIN,phantom_align)
	$(call TRAIN,phantom_difference)
	.venv/bin/python model.py --model runs/phantom_difference/last --out runs/phantom_difference/merged
	$(call TRAIN,phantom_lora)
	.venv/bin/python model.py --model runs/phantom_lora/last --with-encoder --out runs/phantom
	.venv/bin/python eval.py prior --model runs/phantom --questions runs/hospital/data/findings_test_questions.jsonl --image-folder runs/hospital --truth runs/hospital/truth.jsonl --limit 1000 --out runs/priors

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(PIP) -r requirements.txt
	touch $@

.venv/installed: .venv/ready requirements-test.txt
	$(PIP) -r requirements-test.txt
	touch $@
