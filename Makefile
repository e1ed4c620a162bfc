# Everything a person needs: `make demo`, `make test`, `make check`. Only Python 3.11 or newer must be there.
VENV   ?= .venv
PYTHON ?= python3
BIN    := $(VENV)/bin
CODE   := weft tests benchmarks docs
JOBS   ?= 2
TESTS  := $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

.PHONY: demo test check docs format bench clean

demo: $(VENV)/ready
	$(BIN)/weft run examples/medquad.yaml --out runs/demo --overwrite

test: $(VENV)/ready
	$(TESTS)

check: $(VENV)/ready
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)
	$(BIN)/mypy
	$(BIN)/python docs/write.py --check
	$(TESTS)

docs: $(VENV)/ready
	$(BIN)/python docs/write.py

format: $(VENV)/ready
	$(BIN)/ruff format $(CODE)
	$(BIN)/ruff check --fix $(CODE)

bench: $(VENV)/ready
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/kill_and_resume.py

$(VENV)/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Weft needs Python 3.11 or newer: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) runs build *.egg-info
