PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready

.PHONY: demo test test-long test-sanitized test-lowest test-floor fuzz clean

demo: $(READY)
	$(BIN)/python examples/demo.py

JOBS ?= 2

test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -m "not long" -n $(JOBS) --dist worksteal

test-long: $(READY)
	$(BIN)/python -m pytest -m long -s

# The C extensions under AddressSanitizer and UBSan; needs gcc.
test-sanitized: $(READY)
	tests/run_sanitized.sh $(BIN)/python

# Quick tests with the lowest versions declared in setup.cfg, except torch's.
LOWEST := .venv-lowest
QUICK := architecture bad_images build checkpoints cli dataset export hr_alone images imresize index losses metrics model plan \
	stage tiles verify workspace

test-lowest: $(LOWEST)/ready
	$(LOWEST)/bin/python -m pytest -m "not long" -p no:cacheprovider $(QUICK:%=tests/*/test_%.py)

$(LOWEST)/ready: setup.cfg setup.py pyproject.toml constraints.txt tests/lowest.py
	rm -rf $(LOWEST)
	$(PYTHON) -m venv $(LOWEST)
	$(PYTHON) tests/lowest.py > $(LOWEST)/lowest.txt
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check -r $(LOWEST)/lowest.txt
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

# Tests without torch, on every installed Python or those in PYTHONS; run by hand.
test-floor:
	tests/run_floor.sh $(PYTHONS)

FUZZ_SECONDS ?= 300
FUZZED := fuzz fuzz_checkpoints fuzz_records gather_kernel imresize_kernel

fuzz: $(READY)
	SRSHARDS_FUZZ_SECONDS=$(FUZZ_SECONDS) SRSHARDS_FUZZ_SEED=$${SRSHARDS_FUZZ_SEED:-$$(date +%s)} \
		$(BIN)/python -m pytest $(FUZZED:%=tests/*/test_%.py)

# Rebuilt when dependencies or C sources change. The C extensions are optional: building them may fail.
$(READY): setup.cfg setup.py pyproject.toml constraints.txt $(wildcard */*.h */*/*.c */*/*.h)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[demo,test]'
	touch $@

clean:
	rm -rf $(VENV) $(LOWEST) .venv-floor build demo *.egg-info */*/*.so
