# Needs only Python 3.11 or newer. `make help` lists what can be made.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help sample test test-slow lint clean

help: ## list what can be made
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

sample: .venv/sample ## make out.mp4 with the small model
	$(BIN)/python -m cogi2v_jax.sample --output out.mp4

test: .venv/test ## run the tests
	$(BIN)/python -m pytest -n 2 --dist loadfile

# The released checkpoints through the TPU compiler; more meshes, dtypes and tiles.
test-slow: .venv/test ## run the tests that take minutes each
	$(BIN)/python -m pytest -m slow

lint: .venv/test ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean: ## remove the virtual environment and what was built
	rm -rf .venv build *.egg-info

# Each stamp is an extra's installation; a changed pyproject.toml installs again.
.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	"Python 3.11 or newer is needed: set PYTHON=python3.x")'
	$(PYTHON) -m venv .venv

.venv/sample: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

.venv/test: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@ .venv/sample
