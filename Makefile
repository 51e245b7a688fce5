PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready

.PHONY: demo test test-long fuzz clean

demo: $(READY)
	$(BIN)/python examples/demo.py

test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -m "not long"

test-long: $(READY)
	$(BIN)/python -m pytest -m long -s

FUZZ_SECONDS ?= 300

fuzz: $(READY)
	SRSHARDS_FUZZ_SECONDS=$(FUZZ_SECONDS) SRSHARDS_FUZZ_SEED=$${SRSHARDS_FUZZ_SEED:-$$(date +%s)} \
		$(BIN)/python -m pytest tests/test_fuzz.py

# Built again when what is installed changes; the kernels are optional, their build may fail.
$(READY): setup.cfg setup.py pyproject.toml constraints.txt loader/_gather.c prep/_imresize.c model/_mixing.c model/_mixing_parts.h
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[demo,test]'
	touch $@

clean:
	rm -rf $(VENV) build demo *.egg-info loader/*.so prep/*.so model/*.so
