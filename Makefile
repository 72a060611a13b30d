# Two commands do everything: `make serve` and `make test`. Both set up .venv first.
# A machine needs Python >= 3.11 with venv, make and a package index; no compiler, no Node (but for
# `make page`, which rebuilds the page after a change of its sources).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

# A machine with an NVIDIA GPU gets the index's own torch; others the small CPU build.
CONSTRAINTS := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1 || echo "-c constraints.txt")

# OpenMP's threads do not spin while they wait (docs/log.md).
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: serve test check bench soak page screenshots clean

serve: $(VENV)/.serve
	@$(BIN)/chatserve serve $(ARGS)

# Two processes, each with whole files of tests, one thread for each one's sums; the checks run beside
# the first tests, and what they say comes last.
test: $(VENV)/.test
	@mkdir -p build; $(MAKE) --no-print-directory check > build/check.log 2>&1 & checks=$$!; \
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not soak" -n 2 --dist loadfile $(ARGS); tests=$$?; \
	wait $$checks; checks=$$?; cat build/check.log; \
	[ $$tests = 0 ] && [ $$checks = 0 ]

check: $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/basedpyright

# Other events each time; the seed that a failing test shows repeats it (tests/seeds.py).
soak: $(VENV)/.test
	CHATSERVE_SEED=$${CHATSERVE_SEED:-random} $(BIN)/python -m pytest -m soak $(ARGS)

bench: $(VENV)/.test
	$(BIN)/python -m benchmarks $(ARGS)

# Only after a change in web/: the built page is committed, so nobody else needs Node.
page:
	cd web && npm ci --no-audit --no-fund && npm run check && npm run build

# The pictures in docs/screenshots, after a change of how a page looks. Needs a Chromium.
screenshots: $(VENV)/.test
	$(BIN)/python -m benchmarks.screenshots $(ARGS)

clean:
	rm -rf web/node_modules
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

# Made whole or made anew: a set-up that was cut off leaves no .made behind.
$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "chatserve needs Python 3.11 or newer as '$(PYTHON)'; name another one: make PYTHON=python3.12 ..." >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "This Python lacks venv: install the package python3-venv (Debian, Ubuntu: apt-get install python3-venv)" >&2; exit 2; }
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV)
	@touch $@

# torch first: with it there, nothing else can pull in another build.
$(VENV)/.torch: constraints.txt | $(VENV)/.made
	@echo "Setting up $(VENV): PyTorch and the rest; this takes a minute or two."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(CONSTRAINTS) torch
	@touch $@

$(VENV)/.serve: pyproject.toml $(VENV)/.torch
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(CONSTRAINTS) -e .
	@touch $@

$(VENV)/.test: pyproject.toml $(VENV)/.torch
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(CONSTRAINTS) -e ".[test]"
	@touch $@ $(VENV)/.serve
