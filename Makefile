PYTHON ?= python3

.PHONY: test
test: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/python -m pytest

.venv/installed: requirements.txt requirements-test.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	.venv/bin/pip install --quiet --disable-pip-version-check -r requirements-test.txt
	touch $@
