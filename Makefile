# Two commands do everything on a fresh machine with Python >= 3.11 and pip: `make demo` and `make test`.
# Both share one `.venv`, made when there is none; a stamp in it says what is installed, so a second run starts at once.

# python3 if it is new enough, else the newest beside it; `make PYTHON=/path/to/python` overrides.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$p" && break; done)
VENV ?= .venv

# The environment's programs come first on the PATH, as after `activate`: DeepSpeed looks for `ninja` there.
RUN = PATH="$(abspath $(VENV))/bin:$$PATH"
PIP = DS_BUILD_OPS=0 $(VENV)/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt
PYTEST = OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(RUN) python -m pytest
STAMPS = $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo demo-multitask demo-classification demo-layerwise test fast matrix-layerwise matrix-fusion matrix-together quality format clean
.DELETE_ON_ERROR:

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 20

install: $(STAMPS)-demo  ## install the package and the tested versions of what it needs

demo: $(STAMPS)-demo  ## train the embedded default end to end on CPU
	@$(RUN) accelerate launch recipes/sft_curriculum.py

demo-multitask: $(STAMPS)-demo  ## train four generated tasks with CGC-LoRA and export them, on CPU
	@$(RUN) accelerate launch recipes/multitask_cgc_lora.py

demo-classification: $(STAMPS)-demo  ## train four related classifiers that consult one another, on CPU
	@$(RUN) accelerate launch recipes/multitask_classification.py

demo-layerwise: $(STAMPS)-demo  ## train a quarter of the layers at a time, beside all of them, on CPU
	@$(RUN) accelerate launch recipes/sft_layerwise.py

test: $(STAMPS)-test  ## the whole test suite
	@$(PYTEST) -n 2 --dist worksteal

fast: $(STAMPS)-test  ## the tests of one process that take seconds
	@$(PYTEST) -n 2 --dist worksteal -m "not slow and not distributed"

matrix-layerwise: $(STAMPS)-test  ## layer freezing under every backend, method and checkpointing
	@$(PYTEST) -n 2 --dist worksteal -m matrix tests/layerwise

matrix-fusion: $(STAMPS)-test  ## attention fusion under every backend, level and stage
	@$(PYTEST) -n 2 --dist worksteal -m matrix tests/multitask

matrix-together: $(STAMPS)-test  ## order, memory, place and sharing in one run, under every backend
	@$(PYTEST) -n 2 --dist worksteal -m matrix tests/test_together.py

quality: $(STAMPS)-dev  ## ruff check, ruff format --check, mypy
	@$(RUN) ruff check .
	@$(RUN) ruff format --check .
	@$(RUN) mypy

format: $(STAMPS)-dev  ## correct what ruff can correct
	@$(RUN) ruff check --fix .
	@$(RUN) ruff format .

clean:  ## remove the environment, builds and caches of tools; what runs have written stays
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The order-only prerequisite makes the environment once; its own time does not matter.
$(STAMPS)-demo: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing hf_curriculum into $(VENV) (once; a few minutes) ..."
	@$(PIP) -e .
	@touch $@
	@echo "Installed."

# A wider install holds the narrower ones.
$(STAMPS)-test: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing hf_curriculum and its test extra into $(VENV) (once; a few minutes) ..."
	@$(PIP) -e ".[test]"
	@touch $(STAMPS)-demo $@
	@echo "Installed."

$(STAMPS)-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing hf_curriculum and its dev extra into $(VENV) (once; a few minutes) ..."
	@$(PIP) -e ".[dev]"
	@touch $(STAMPS)-demo $(STAMPS)-test $@
	@echo "Installed."

# Some systems split `ensurepip` from Python: there the outer pip fills the environment.
$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "make: got no Python >= 3.11 on the PATH, expected python3, python3.13, python3.12 or python3.11. Install one, or name it: make PYTHON=/path/to/python" >&2; exit 1; }
	@echo "Making $(VENV) with $(PYTHON) ..."
	@"$(PYTHON)" -m venv $(VENV) >/dev/null 2>&1 \
		|| { "$(PYTHON)" -m venv --clear --without-pip $(VENV) \
			&& "$(PYTHON)" -m pip --python $(VENV)/bin/python install -qq pip; } \
		|| { rm -rf $(VENV); exit 1; }
