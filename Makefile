# `make demo`, `make test` and `make docs` set everything up by themselves, in .venv.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# A file that pins versions, such as tests/lowest.txt
CONSTRAINTS ?=
# The tests that other releases of JAX, Flax and Orbax are the likeliest to break.
QUICK := tests/test_published.py tests/test_schedules.py tests/test_plan.py tests/test_sampler.py \
	tests/test_checkpoint.py tests/test_pipeline.py tests/test_parallel.py tests/test_export.py \
	tests/test_convert.py tests/test_dit.py tests/test_inception.py tests/test_metrics.py \
	tests/test_evaluate.py tests/test_clip.py tests/test_unet.py tests/test_vq.py tests/test_text.py
# For `make networks`, e.g. --data fashion_mnist.npz; without it tensorflow-datasets is asked.
DATA ?=
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)

.PHONY: demo test quick lint docs networks clean

demo: $(VENV)/.demo-ready
	$(BIN)/tstitch networks
	$(BIN)/tstitch sample --out samples.png

test: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal

quick: $(VENV)/.test-ready
	$(BIN)/python -m pytest -n 2 --dist worksteal $(QUICK)

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
	$(BIN)/python -m pip install --quiet -e . $(addprefix -c ,$(CONSTRAINTS))
	touch $@

$(VENV)/.test-ready: $(BIN)/pip setup.py $(CONSTRAINTS)
	$(BIN)/python -m pip install --quiet -e '.[test]' $(addprefix -c ,$(CONSTRAINTS))
	touch $@

$(VENV)/.docs-ready: $(BIN)/pip setup.py
	$(BIN)/python -m pip install --quiet -e '.[docs]'
	touch $@
