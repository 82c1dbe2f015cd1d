PYTHON ?= python3
PIP = .venv/bin/pip install --quiet --disable-pip-version-check

.PHONY: demo app test test-long test-fuzz test-kernel phantom phantom-pair

# a report on a drawn patient beside the previous image, and the same with the two images exchanged
demo: .venv/ready
	.venv/bin/python sample.py --model assets/phantom --images assets/current.png assets/prior.png --max-new-tokens 200
	.venv/bin/python sample.py --model assets/phantom --images assets/prior.png assets/current.png --max-new-tokens 200

# a page in the browser, with the toy model
app: .venv/app
	.venv/bin/python app.py --model assets/phantom --max-new-tokens 200 --open

test: .venv/installed
	.venv/bin/ruff check .
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2

# the proofs that take long: many kills of training, of the image cache and of answering
test-long: .venv/installed
	KILLS=30 .venv/bin/python -m pytest tests/test_train.py -k killed
	KILLS=20 .venv/bin/python -m pytest tests/sources/test_cache.py -k killed
	KILLS=10 .venv/bin/python -m pytest tests/evaluation/test_answering.py -k killed

# 2,000 bad files, flags and broken states
test-fuzz: .venv/installed
	.venv/bin/python tests/fuzz.py

# the fused kernel compiled for every target, head size and type, without a GPU
test-kernel: .venv/installed
	.venv/bin/python -m bench.kernel_proofs

# a hospital is drawn, a model learns it from nothing in four runs of two processes, and its scores are printed
phantom: runs/hospital/data/.ready
	$(call TRAIN,pretrain,phantom)
	$(call STAGES,phantom)

# the same from the same stage 0 with the plainest connector that sees both images, to compare: runs/pair
phantom-pair: runs/hospital/data/.ready
	$(call STAGES,pair,--connector=mlp2x_gelu_pair --select_layer=-1)

# stage, prefix of the runs, settings; what was stopped goes on
TRAIN = OMP_NUM_THREADS=1 MALLOC_MMAP_THRESHOLD_=16777216 .venv/bin/torchrun --nproc-per-node 2 train.py configs/phantom_$(1).py \
	--out_dir=runs/$(2)_$(1) $(3) $(if $(wildcard runs/$(2)_$(1)/checkpoints/*.pt),--resume)

# prefix of the runs, settings of the connector
define STAGES
	$(call TRAIN,align,$(1),$(2))
	$(call TRAIN,difference,$(1),--model=runs/$(1)_align/last)
	.venv/bin/python model.py --model runs/$(1)_difference/last --out runs/$(1)_difference/merged
	$(call TRAIN,lora,$(1),--model=runs/$(1)_difference/merged)
	.venv/bin/python model.py --model runs/$(1)_lora/last --with-encoder --out runs/$(1)
	.venv/bin/python eval.py prior --model runs/$(1) --questions runs/hospital/data/findings_test_questions.jsonl \
		--image-folder runs/hospital --truth runs/hospital/truth.jsonl --limit 1000 --out runs/$(1)_priors
endef

VQA = .venv/bin/python prepare.py diff-vqa --root runs/hospital --questions runs/hospital/mimic_pair_questions.csv
FINDINGS = .venv/bin/python prepare.py mimic-cxr --root runs/hospital --section findings --context indication,history
runs/hospital/data/.ready: .venv/ready
	.venv/bin/python prepare.py phantom --out runs/hospital --patients 10000 --size 96 --aligned
	$(FINDINGS) --out runs/hospital/data
	$(FINDINGS) --out runs/hospital/data --no-context
	$(VQA) --out runs/hospital/data
	$(VQA) --out runs/hospital/data --type difference
	touch $@

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(PIP) -r requirements.txt
	touch $@

.venv/app: .venv/ready requirements-app.txt
	$(PIP) -r requirements-app.txt
	touch $@

.venv/installed: .venv/app requirements-test.txt
	$(PIP) -r requirements-test.txt
	touch $@
