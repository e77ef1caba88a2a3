# Needs only Python 3.11 or newer. `make help` lists what can be made.
PYTHON ?= python3
BIN := .venv/bin
NEWEST := .venv/newest

.PHONY: help sample test test-slow test-release test-newest embedded lint clean

help: ## list what can be made
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

sample: .venv/sample ## make out.mp4 with the small model
	$(BIN)/python -m cogi2v_jax.sample --output out.mp4

test: .venv/test ## run the tests
	$(BIN)/python -m pytest -n 2 --dist loadfile

# More meshes, dtypes, tiles and processes.
test-slow: .venv/test ## run the tests that repeat those of `make test` for more cases
	$(BIN)/python -m pytest -n 2 --dist loadfile -m slow

# The released checkpoints: at their size, and through the TPU compiler.
test-release: .venv/test ## run the tests that take minutes each
	$(BIN)/python -m pytest -m release

# A new environment each time, for what pip resolves today. PYENV_VERSION is for machines where pyenv
# would run only its default version.
test-newest: .venv/test ## install without PyTorch on Python 3.13 or 3.12; sample, and verify a trace
	for python in python3.13 python3.12 $(BIN)/python; do \
	PYENV_VERSION=$${python#python} $$python -m venv --clear $(NEWEST) && break; done
	rm -rf build
	$(NEWEST)/bin/python -m pip install --quiet .
	$(NEWEST)/bin/python --version
	$(NEWEST)/bin/python -m pip list | grep -E '^(jax|flax|orbax|numpy)'
	! $(NEWEST)/bin/python -c 'import torch' 2>/dev/null
	$(NEWEST)/bin/cogi2v-sample --num_inference_steps 2 --output $(NEWEST)/out.mp4
	$(BIN)/cogi2v-convert record cogi2v_jax/assets/cogi2v-tiny $(NEWEST)/trace.safetensors \
	--image cogi2v_jax/assets/example.png --prompt 'the cyan triangle grows' --num_inference_steps 2
	$(NEWEST)/bin/cogi2v-convert verify cogi2v-tiny $(NEWEST)/trace.safetensors

# Six hours on two cores. Stopped at any moment, the same command goes on. T5 and the VAE are those
# of the embedded model that is there.
embedded: trained/diffusers ## train the embedded model anew

CLIPS_1 = --clips 8100 --seed 1 --motions left right up down grows shrinks spins spins still
CLIPS_2 = --clips 8000 --seed 2 --motions left right up down grows grows spins spins shrinks still
CLIPS_3 = --clips 8000 --seed 4 --motions left right up down grows grows spins spins shrinks still
TRAIN = $(BIN)/python -m cogi2v_jax.train cogi2v-tiny
LATER = learning_rate=1e-2 warmup=50

.PRECIOUS: trained/clips-% trained/latents-%

trained/clips-%: | .venv/test
	rm -rf $@.part
	mkdir -p trained
	$(BIN)/python -m cogi2v_jax.training.shapes $@.part $(CLIPS_$*)
	mv $@.part $@

trained/latents-%: | trained/clips-%
	$(BIN)/python -m cogi2v_jax.prepare trained/clips-$* $@.part --model cogi2v-tiny
	mv $@.part $@

trained/first/model: | trained/latents-1
	$(TRAIN) data=trained/latents-1 output=trained/first

trained/second/model: | trained/first/model
	$(TRAIN) data=trained/latents-1 output=trained/second init=trained/first/model \
	steps=3200 $(LATER)

trained/third/model: | trained/second/model trained/latents-2
	$(TRAIN) data=trained/latents-2 output=trained/third init=trained/second/model \
	steps=4500 $(LATER) output_dtype=bfloat16

trained/fourth/model: | trained/third/model trained/latents-3
	$(TRAIN) data=trained/latents-3 output=trained/fourth init=trained/third/model \
	steps=4400 $(LATER) output_dtype=bfloat16

trained/diffusers: | trained/fourth/model
	$(BIN)/cogi2v-convert to-torch trained/fourth/model $@

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
