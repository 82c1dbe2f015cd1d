PYTHON ?= python3
PIP = .venv/bin/pip install --quiet --disable-pip-version-check

.PHONY: demo app test test-long test-fuzz test-kernel phantom phantom-pair ablation

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

# the drawn hospital, a folder in runs/: HOSPITAL=aligned has bodies that all lie nearly alike
HOSPITAL = hospital
DATA = runs/$(HOSPITAL)/data

# a hospital is drawn, a model learns it from nothing in three runs of two processes, and its scores are printed
phantom: runs/$(HOSPITAL)/data/.ready
	$(call TRAIN,pretrain,phantom)
	$(call STAGES,phantom)

# what stage 0 left before the toy in assets/ was trained on, so that other connectors can start where its TAC did
STAGE0 = --decoder=assets/stage0/decoder --encoder=assets/stage0/encoder

# an MLP has none of the settings that start TAC, nor its dropout
MLP = --tac_layer_mean=0 --tac_same_place=0 --tac_shallow=False --tac_dropout=0.1

# stages 1 and 2 with the plainest connector that sees both images, to compare: runs/pair
phantom-pair: runs/$(HOSPITAL)/data/.ready
	$(call STAGES,pair,$(STAGE0) --connector=mlp2x_gelu_pair --select_layer=-1 $(MLP),--tac_dropout=0.1)

# the paper's ablations in about an hour, on a short schedule: connectors, and TAC without its parts
ABLATION = runs/ablation_$(HOSPITAL)
ablation: runs/$(HOSPITAL)/data/.ready
	$(call SHORT,current,--connector=mlp2x_gelu --select_layer=-1 $(MLP),--tac_dropout=0.1)
	$(call SHORT,pair,--connector=mlp2x_gelu_pair --select_layer=-1 $(MLP),--tac_dropout=0.1)
	$(call SHORT,tac)
	$(call SHORT,tac_without_extractor,--tac_without=extractor)
	$(call SHORT,tac_without_prior_bias,--tac_without=prior_bias)
	$(call SHORT,tac_without_self_attention,--tac_without=self_attention)
	$(call SHORT,tac_without_cross_attention,--tac_without=cross_attention)
	.venv/bin/python assets/ablation_table.py $(ABLATION)_*.csv

# the records of each stage, as its config has them
RECORDS_pretrain = --records=$(DATA)/findings_train.jsonl,$(DATA)/diff_vqa_train.jsonl --validation=$(DATA)/findings_validate.jsonl
RECORDS_difference = --records=$(DATA)/every_pair/difference_train.jsonl --validation=$(DATA)/difference_validate.jsonl
RECORDS_lora = --records=$(DATA)/findings_train.jsonl,$(DATA)/findings_no_context_train.jsonl,$(DATA)/difference_train.jsonl \
	--validation=$(DATA)/findings_validate.jsonl

# stage, prefix of the runs, settings; what was stopped goes on
TRAIN = OMP_NUM_THREADS=1 MALLOC_MMAP_THRESHOLD_=16777216 .venv/bin/torchrun --nproc-per-node 2 train.py configs/phantom_$(1).py \
	--out_dir=runs/$(2)_$(1) --image_folder=runs/$(HOSPITAL) $(RECORDS_$(1)) $(3) $(if $(wildcard runs/$(2)_$(1)/checkpoints/*.pt),--resume)

# prefix of the runs, settings of stage 1, of stage 2
define STAGES
	$(call TRAIN,difference,$(1),$(2))
	.venv/bin/python model.py --model runs/$(1)_difference/last --out runs/$(1)_difference/merged
	$(call TRAIN,lora,$(1),--model=runs/$(1)_difference/merged $(3))
	.venv/bin/python model.py --model runs/$(1)_lora/last --with-encoder --out runs/$(1)
	.venv/bin/python eval.py prior --model runs/$(1) --questions runs/$(HOSPITAL)/data/findings_test_questions.jsonl \
		--image-folder runs/$(HOSPITAL) --truth runs/$(HOSPITAL)/truth.jsonl --limit 1000 --max-new-tokens 200 \
		--out runs/$(1)_priors
endef

# name of the connector, settings of stage 1, of stage 2
define SHORT
	$(call TRAIN,difference,ablation_$(HOSPITAL)_$(1),$(STAGE0) --max_steps=600 $(2))
	.venv/bin/python model.py --model $(ABLATION)_$(1)_difference/last --out $(ABLATION)_$(1)_difference/merged
	$(call TRAIN,lora,ablation_$(HOSPITAL)_$(1),--model=$(ABLATION)_$(1)_difference/merged --max_steps=250 $(3))
	.venv/bin/python eval.py prior --model $(ABLATION)_$(1)_lora/last --questions runs/$(HOSPITAL)/data/findings_test_questions.jsonl \
		--image-folder runs/$(HOSPITAL) --truth runs/$(HOSPITAL)/truth.jsonl --limit 300 --max-new-tokens 200 \
		--conditions true,dummy,reversed --out $(ABLATION)_$(1)_priors --csv $(ABLATION)_$(1).csv
endef

VQA = .venv/bin/python prepare.py diff-vqa --root runs/$* --questions runs/$*
FINDINGS = .venv/bin/python prepare.py mimic-cxr --root runs/$* --section findings --out runs/$*/data
runs/%/data/.ready: .venv/ready
	.venv/bin/python prepare.py phantom --out runs/$* --patients 10000 --size 96 $(if $(filter aligned,$*),--aligned)
	$(FINDINGS)
	$(FINDINGS) --no-context
	$(VQA)/mimic_pair_questions.csv --out runs/$*/data
	$(VQA)/mimic_pair_questions.csv --out runs/$*/data --type difference
	$(VQA)/every_pair_difference.csv --out runs/$*/data/every_pair --type difference
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
