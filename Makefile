# Two commands on a fresh machine: `make demo` trains the quartet on real text, `make test` proves the checkout.
PYTHON ?= python3
RUN := .venv/bin/python

.PHONY: demo test lint venv clean

demo: venv
	$(RUN) -m scripts.train experiment=quartet/demo

test: lint
	$(RUN) -m pytest --numprocesses auto --dist loadfile

lint: venv
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy
	$(RUN) -m scripts.tables --check

venv:
	@$(PYTHON) scripts/setup.py

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
