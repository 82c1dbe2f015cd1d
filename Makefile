PYTHON ?= python3

.PHONY: test test-long test-kernel
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

.venv/installed: requirements.txt requirements-test.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	.venv/bin/pip install --quiet --disable-pip-version-check -r requirements-test.txt
	touch $@
