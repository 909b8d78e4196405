# `make help` lists the targets. They run in the environment $(VENV), which is made when it is missing and brought up
# to date when pyproject.toml changes. Only sh, make and a Python are needed.
VENV ?= .venv
PYTHON ?=
EXTRAS ?=
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup train test test-all lint bench notebooks docs clean FORCE

python := $(VENV)/bin/python
# Most of a test's time is compiling, which uses one core.
parallel := -n 2 --dist loadgroup
comma := ,
# The compilers for TPUs and GPUs run on any Linux machine. They lie outside the environment, for tests alone: inside,
# every start of jax would look for a TPU, and complain of missing CUDA libraries. For the same reason only the tests that
# compile for a GPU put its compiler on their path.
tpu := $(VENV)/tpu-compiler
gpu := $(VENV)/gpu-compiler
with_tpu := PYTHONPATH="$(tpu)$${PYTHONPATH:+:$$PYTHONPATH}"
# Written last, so that a failed installation leaves none. It records what was asked for: "python=... extras=...".
stamp := $(VENV)/.installed
recorded := $(shell cat $(stamp) 2>/dev/null)
recorded_python := $(patsubst python=%,%,$(filter python=%,$(recorded)))
recorded_extras := $(patsubst extras=%,%,$(filter extras=%,$(recorded)))
wanted_python := $(or $(PYTHON),$(recorded_python))
wanted_extras := $(or $(EXTRAS),$(recorded_extras))

# An environment of another PYTHON, or one that does not start, is made anew; other EXTRAS are installed into it.
starts := $(shell $(python) -c 'import pip; print("yes")' 2>/dev/null)
anew := $(if $(filter yes,$(starts)),$(if $(filter-out $(recorded_python),$(wanted_python)),yes),yes)
again := $(filter-out $(recorded_extras),$(wanted_extras))

help: ## List the targets
	@echo "Usage: make TARGET"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "Settings, as in make train ARGS=\"--help\":"
	@echo "  ARGS       more arguments for the command behind train, test, test-all, bench, notebooks and docs"
	@echo "  PYTHON     the Python to make $(VENV) with, instead of the newest supported one that is found"
	@echo "  EXTRAS     installed beside dev, such as gpu or tpu"
	@echo "  VENV       the environment's folder, instead of .venv"

setup: $(stamp) ## Make the environment (the other targets do it themselves when needed)
	@echo "$(VENV) is ready."

train: $(stamp) ## Train the small language model on real text (ARGS="--help" lists what can be set)
	@echo "Training: python -m experiments.train_lm $(ARGS)"
	@$(python) -m experiments.train_lm $(ARGS)

test: $(stamp) $(tpu)/.installed $(gpu)/.installed ## Run the quick tests
	@echo "Running the tests that are marked neither slow nor peers (make test-all runs all of them)"
	@$(with_tpu) $(python) -m pytest $(parallel) $(ARGS)

test-all: $(stamp) $(tpu)/.installed $(gpu)/.installed ## Run all tests
	@echo "Running all tests"
	@$(with_tpu) $(python) -m pytest $(parallel) -m "" $(ARGS)

lint: $(stamp) ## Check style, format and types
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) -m pyrefly check --python-interpreter-path $(python)

bench: $(stamp) ## Time every recurrence and form on this machine
	@echo "Timing: python -m experiments.bench_recurrences $(ARGS)"
	@$(python) -m experiments.bench_recurrences $(ARGS)

notebooks: $(stamp) $(tpu)/.installed ## Execute the notebooks from start to end, leaving the files as they are
	@echo "Executing the notebooks"
	@$(with_tpu) $(python) -m pytest -m "" tests/test_notebooks.py $(ARGS)

docs: $(stamp) $(tpu)/.installed ## Build the documentation into docs/site (ARGS=serve shows it while you write)
	@echo "Building the documentation: python docs/site_build $(ARGS)"
	@$(with_tpu) $(python) docs/site_build $(ARGS)

clean: ## Remove the environment, caches and builds (runs are kept)
	rm -rf $(VENV) .cache build dist docs/site docs/.cache *.egg-info
	find lineax_seq pallas_kernels experiments tests -name __pycache__ -prune -exec rm -rf {} +

$(stamp): pyproject.toml $(if $(anew)$(again),FORCE)
	@for extra in $(subst $(comma), ,$(wanted_extras)); do grep -q "^$$extra = \[" pyproject.toml || { \
	    echo "make: EXTRAS=$(wanted_extras): pyproject.toml has no extra $$extra" >&2; exit 1; }; done
ifeq ($(anew),yes)
	@if [ -e $(VENV) ] && [ ! -e $(VENV)/pyvenv.cfg ]; then \
	    echo "make: $(VENV) is there and is no Python environment: remove it, or name another with VENV=" >&2; exit 1; fi
	@python=$$(sh .ci/find-python "$(wanted_python)") && echo "Making the environment $(VENV)" && \
	    rm -f $@ && "$$python" -m venv --clear $(VENV)
endif
	@rm -f $@
	@echo "Installing lineax_seq and what it needs into $(VENV) (some minutes and about 1.5 GB the first time)"
	@$(python) -m pip install -qq --disable-pip-version-check --editable ".[dev$(addprefix $(comma),$(wanted_extras))]"
	@echo "python=$(wanted_python) extras=$(wanted_extras)" >$@

# The versions that this jax wants. The GPU's is two packages of one version, without the CUDA libraries.
$(tpu)/.installed: what := the TPU compiler into $(tpu) (200 MB)
$(tpu)/.installed: wanted := *(r for r in all if r.startswith('libtpu'))
$(gpu)/.installed: what := the GPU compiler into $(gpu) (400 MB)
$(gpu)/.installed: wanted := *(r.replace('plugin[with-cuda]', part) for r in all if r.startswith('jax-cuda13-plugin[') for part in ('plugin', 'pjrt'))

$(tpu)/.installed $(gpu)/.installed: $(stamp)
	@echo "Installing $(what), the version that this jax wants"
	@mkdir -p $(@D)
	@set -f; wanted=$$($(python) -c "import importlib.metadata as m; all = [r.split(';')[0] for r in m.requires('jax')]; print($(wanted))") && \
	    $(python) -m pip install -qq --disable-pip-version-check --no-deps --upgrade --target $(@D) $$wanted || \
	    echo "make: no such compiler for this machine; the tests that need it are skipped"
	@touch $@
