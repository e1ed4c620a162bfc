# Everything a person needs: `make demo`, `make test`, `make check`. Only Python 3.11 or newer must be there.
VENV   ?= .venv
PYTHON ?= python3
BIN    := $(VENV)/bin

.PHONY: demo test check format bench clean

demo: $(VENV)/ready
	$(BIN)/weft run examples/medquad.yaml --out runs/demo --overwrite

test: $(VENV)/ready
	$(BIN)/python -m pytest

check: $(VENV)/ready
	$(BIN)/ruff format --check weft tests benchmarks
	$(BIN)/ruff check weft tests benchmarks
	$(BIN)/mypy
	$(BIN)/python -m pytest

format: $(VENV)/ready
	$(BIN)/ruff format weft tests benchmarks
	$(BIN)/ruff check --fix weft tests benchmarks

bench: $(VENV)/ready
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/kill_and_resume.py

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) runs build *.egg-info
