# Every target works alone on a fresh machine with Python >= 3.11; the second run needs no network.
#   make quickstart                     grow a small population, merge it, write runs/quickstart/report.html
#   make test                           fast tests and tests on a local Ray
#   make check                          what CI runs: format, lint, types, tests
# Another Python:       make quickstart PYTHON=python3.12
# CPU build of torch:   make quickstart PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu   (0.3 GB instead of 3.8)

PYTHON ?= python3
PYTEST_WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# DeepSpeed would compile CUDA operators at installation; none of them is used here.
export DS_BUILD_OPS := 0

.PHONY: quickstart test test-slow check bench clean distclean
.DELETE_ON_ERROR:

quickstart: $(INSTALLED)
	$(BIN)/chrysalis run experiments/quickstart.yaml

test: $(INSTALLED)
	$(BIN)/python -m pytest -m "not slow and not ray" -n $(PYTEST_WORKERS) --dist loadfile
	$(BIN)/python -m pytest -m "ray and not slow"

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(MAKE) test

bench: $(INSTALLED)
	$(BIN)/python benchmarks/packing.py --json
	$(BIN)/python benchmarks/population.py --concurrency 1 2 8 --json
	$(BIN)/python benchmarks/population.py --scheduler fifo --without-ray --json
	$(BIN)/python benchmarks/population.py --work 10 --concurrency 2 --json
	$(BIN)/python benchmarks/ridge.py --memory --json
	$(BIN)/python benchmarks/controller.py --json
	$(BIN)/python benchmarks/plan_accuracy.py --json
	$(BIN)/python benchmarks/recovery.py
	$(BIN)/python benchmarks/merge.py --json
	$(BIN)/python benchmarks/judge.py --making --json
	$(BIN)/python benchmarks/genome.py --json
	$(BIN)/python benchmarks/mixer.py --json

# The stamp is touched last: an interrupted installation is taken up again.
$(INSTALLED): pyproject.toml constraints.txt $(wildcard chrysalis_ray/genome/_sketching.[ch])
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "chrysalis_ray needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>/dev/null || echo not one)." >&2; \
	  echo "Name one that is:  make $(or $(MAKECMDGOALS),quickstart) PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { \
	  echo "'$(PYTHON)' cannot make virtual environments; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@if [ -x $(BIN)/python ] && \
	  [ "$$($(BIN)/python -c 'import sys; print(sys.version_info[:2])')" != "$$($(PYTHON) -c 'import sys; print(sys.version_info[:2])')" ]; \
	  then rm -rf $(VENV); fi
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev,optuna,pb2]'
	touch $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find chrysalis_ray tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
	rm -f chrysalis_ray/genome/_sketching*.so
