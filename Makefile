# Everything installs into .venv inside the clone. Needs Python 3.11 or newer, g++ and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
TORCH := 2.13.0

.PHONY: install quickstart test test-engines test-others test-slow check lock clean

install: $(STAMP)

# The CPU build of torch comes from the configured index if it is there, else from PyTorch's own:
# plain PyPI would bring several GB of CUDA. The lock is complete, hence --no-deps. DeepSpeed's
# operator is compiled here once instead of in the first run, and so is a package that comes as source
# and warns when it is compiled: pip leaves that out where PYTHONDONTWRITEBYTECODE is set.
$(STAMP): requirements/cpu.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "posttrain needs Python 3.11 or newer; try: make PYTHON=python3.12"; exit 1; }
	@command -v g++ > /dev/null || { echo "posttrain needs g++ (Debian: apt-get install g++)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-deps "torch==$(TORCH)+cpu" 2> /dev/null || $(BIN)/pip install \
		--quiet --no-deps "torch==$(TORCH)+cpu" --index-url https://download.pytorch.org/whl/cpu
	$(BIN)/pip install --quiet --no-deps --require-hashes -r requirements/cpu.lock
	$(BIN)/pip install --quiet --no-deps --no-build-isolation -e .
	$(BIN)/python -W ignore -m compileall -q $(VENV)/lib/python*/site-packages/cellpylib
	PATH="$(CURDIR)/$(BIN):$$PATH" DS_ACCELERATOR=cpu $(BIN)/python -W ignore -c "from deepspeed.comm.torch import build_shm_op; build_shm_op()" > /dev/null
	@touch $@

quickstart: $(STAMP)
	$(BIN)/posttrain run configs/quickstart.yaml

# Two processes side by side, of which one has all that starts engines. A thread for each: more
# threads than cores hinder each other.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(MAKE) --jobs 2 test-engines test-others

test-engines: $(STAMP)
	$(BIN)/python -m pytest -q -m "not slow and (engine or e2e)"

test-others: $(STAMP)
	$(BIN)/python -m pytest -q -m "not slow and not engine and not e2e"

test-slow: $(STAMP)
	$(BIN)/python -m pytest -q -m slow

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Needs uv. What the lock leaves out and why stands in the two files that it is made from.
lock:
	uv pip compile requirements/cpu.in --override requirements/cpu.overrides --generate-hashes \
		--python-version 3.11 --no-header --no-annotate --no-emit-package torch \
		--no-emit-package triton -o requirements/cpu.lock

clean:
	rm -rf $(VENV) build dist *.egg-info
