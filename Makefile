# `make demo`, `make test` and `make docs` set everything up by themselves, in .venv.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# A file of pinned packages, such as tests/colab.txt, in place of the newest releases.
VERSIONS ?=
# The TPU compiler, which runs without a TPU; a file of versions names its own.
TPU := 'jax[tpu]; sys_platform == "linux" and platform_machine == "x86_64"'
# The tests that depend most on the releases of JAX, Flax and Orbax.
QUICK := $(addprefix tests/test_,$(addsuffix .py,published sampler checkpoint pipeline parallel \
	export convert evaluate notebooks))
# For `make networks`, e.g. --data fashion_mnist.npz; without it tensorflow-datasets is asked.
DATA ?=
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)

.PHONY: demo test quick full lint docs networks clean

demo: $(VENV)/.demo-ready
	$(BIN)/tstitch networks
	$(BIN)/tstitch sample --out samples.png

test: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal

quick: $(VENV)/.test-ready
	$(BIN)/python -m pytest -n 2 --dist worksteal $(QUICK)

# Every test, also with the instructions of older CPUs, and the published networks through the TPU
# compiler. The option halves that compiler's search for each convolution's form.
full: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal -m 'full or not full'
	for isa in AVX2 SSE4_2; do \
		XLA_FLAGS=--xla_cpu_max_isa=$$isa $(BIN)/python -m pytest -n 2 --dist worksteal || exit 1; \
	done
	LIBTPU_INIT_ARGS=--xla_jf_convolution_performance_target=0.95 \
		$(BIN)/python benchmarks/tpu_aot.py --check

lint: $(VENV)/.test-ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

# The guide, into site/; a broken link or anything else amiss is an error.
docs: $(VENV)/.docs-ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Trains the embedded networks anew, three of them in two parts.
networks: $(VENV)/.test-ready
	for part in features s s_more b b_more xl xl_more; do \
		$(BIN)/tstitch train configs/fashion_$$part.py --out runs/fashion_$$part $(DATA) || exit 1; \
	done
	for pair in features:features s:s_more b:b_more xl:xl_more; do \
		name=tstitch_jax/embedded/fashion-$${pair%:*}; \
		rm -rf $$name && cp -r runs/fashion_$${pair#*:}/network $$name || exit 1; \
	done

clean:
	rm -rf .venv* build site *.egg-info .pytest_cache .ruff_cache .hypothesis

# Debian and Ubuntu keep venv in a package of its own.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -c 'import ensurepip' || { $(SUDO) apt-get update -qq && \
		$(SUDO) apt-get install -y -qq python3-venv; }
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.demo-ready: $(BIN)/pip setup.py
	$(BIN)/python -m pip install --quiet -e .
	touch $@

$(VENV)/.test-ready: $(BIN)/pip setup.py $(VERSIONS)
	$(BIN)/python -m pip install --quiet -e '.[test]' $(or $(addprefix -r ,$(VERSIONS)),$(TPU))
	touch $@

$(VENV)/.docs-ready: $(BIN)/pip setup.py
	$(BIN)/python -m pip install --quiet -e '.[docs]'
	touch $@
