# `make demo` and `make test` do all of their own set-up in .venv, and skip what is already there.
SHELL := /bin/bash
BIN := .venv/bin
# NeMo needs 3.10 to 3.12. Each candidate is run, not only looked for: a pyenv shim may stand for nothing.
FIND := for p in $(PYTHON) python3.11 python3.12 python3.10 python3; do \
	"$$p" -c 'import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null \
	&& echo "$$p" && break; done

export PYTHONWARNINGS ?= ignore::FutureWarning

.PHONY: demo test check test-slow parity clean
demo: .venv/installed  ## align a tiny model, start to finish
	$(BIN)/nemo llm align --factory tiny_dpo -y

# Two at a time: most of a test's time is imports and single-threaded start-up. A file's tests share what they set up.
test: check  ## lint, format, types and tests
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

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
	@python=$$($(FIND)); \
	if [ -z "$$python" ]; then \
		echo "nemo-align needs Python 3.10, 3.11 or 3.12 with venv; none was found."; \
		echo "On Debian or Ubuntu: apt-get install python3.11 python3.11-venv; or: make PYTHON=/path/to/python3.11"; \
		exit 1; fi; \
	test -x $(BIN)/python || "$$python" -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24" "setuptools>=77" wheel
	$(BIN)/python -m pip install --quiet --editable ".[test,dev,gguf,notebooks,docs]" --constraint requirements.lock
	@touch $@

clean:
	rm -rf .venv .venv-parity runs build *.egg-info
