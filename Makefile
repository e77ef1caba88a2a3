# `make sample` makes a video with the embedded model; `make test` runs everything that is tested. Both need only Python 3.11 or newer.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: sample test test-slow lint clean

sample: .venv/sample
	$(BIN)/python -m cogi2v_jax.sample --output out.mp4

test: .venv/test
	$(BIN)/python -m pytest -n 2 --dist loadfile

# What takes minutes: the released checkpoints through the TPU compiler, more meshes, dtypes and tiles.
test-slow: .venv/test
	$(BIN)/python -m pytest -m slow

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean:
	rm -rf .venv build *.egg-info

# Each stamp is an extra's installation; a changed pyproject.toml installs again.
.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: set PYTHON=python3.x")'
	$(PYTHON) -m venv .venv

.venv/sample: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

.venv/test: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@ .venv/sample
