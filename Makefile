# `make demo` and `make test` do all of their own set-up in .venv, and skip what is already there.
SHELL := /bin/bash
BIN := .venv/bin
# NeMo needs 3.10 to 3.12. Each candidate is run, not only looked for: a pyenv shim may stand for nothing.
FIT := import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))
FIND := for p in $(PYTHON) python3.11 python3.12 python3.10 python3; do \
	"$$p" -c '$(FIT)' 2>/dev/null && echo "$$p" && break; done

export PYTHONWARNINGS ?= ignore::FutureWarning

.PHONY: demo test check test-slow parity clean
demo: .venv/installed  ## align a tiny model, start to finish
	$(BIN)/nemo llm align --factory tiny_dpo -y

# Two at a time: most of a test's time is imports and single-threaded start-up. A file's tests share what they set up.
test: check  ## lint, format, types and tests
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=10

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

test-slow: .venv/installed  ## the checks that take minutes
	$(BIN)/python -m pytest -m slow

parity: .venv-parity/installed  ## our losses against TRL's, in an environment of its own
	.venv-parity/bin/python benchmarks/parity.py

.venv-parity/installed: benchmarks/parity.txt requirements.lock
	@python=$$($(FIND)); test -x .venv-parity/bin/python || "$$python" -m venv .venv-parity
	.venv-parity/bin/python -m pip install --quiet --requirement benchmarks/parity.txt --constraint requirements.lock
	@touch $@

.venv/installed: pyproject.toml requirements.lock
	@if [ -e $(BIN)/python ]; then \
		$(BIN)/python -c '$(FIT)' 2>/dev/null || { \
			echo "$$($(BIN)/python --version 2>&1) in .venv does not fit: nemo-align needs 3.10, 3.11 or 3.12 with pip."; \
			echo "Remove it and run make again: rm -rf .venv"; exit 1; }; \
	else \
		python=$$($(FIND)); \
		if [ -z "$$python" ]; then \
			echo "nemo-align needs Python 3.10, 3.11 or 3.12 with venv; none was found."; \
			echo "On Debian or Ubuntu: apt-get install python3.11 python3.11-venv; or: make PYTHON=/path/to/python3.11"; \
			exit 1; fi; \
		echo "Creating .venv with $$("$$python" --version)"; \
		"$$python" -m venv .venv; fi
	@echo "Installing nemo-align, NeMo, Megatron-Core and torch into .venv: about two minutes, 5 GB on a GPU machine"
	@$(BIN)/python -m pip install --quiet --upgrade "pip>=24" "setuptools>=77" wheel
	@# Not setuptools' banner about editable installations.
	@PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --editable ".[test,dev,gguf,notebooks,docs]" --constraint requirements.lock
	@echo "Installed. Commands: $(BIN)/nemo llm --help"
	@touch $@

clean:
	rm -rf .venv .venv-parity runs build *.egg-info
