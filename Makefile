# Each of the two goals does everything on a fresh machine: virtual environment, constraints, and the job itself.
#   make quickstart   the main job: fine-tune a tiny CogVideoX into a FrameBridge model on real clips, and sample
#   make test         lint, types, docstrings and all tests

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: quickstart test lint clean

quickstart: export HF_HUB_OFFLINE = 1
quickstart: $(STAMP)
	$(BIN)/python examples/quickstart/prepare_clips.py --output quickstart-data
	rm -rf runs/quickstart
	$(BIN)/finetrainers train --recipe recipes/quickstart.yaml
	$(BIN)/finetrainers sample --model runs/quickstart --image quickstart-data/heldout/first_frame.png \
		--prompt "$$(cat quickstart-data/heldout/first_frame.txt)" --output runs/quickstart/sample.mp4 --seed 1
	$(BIN)/python examples/quickstart/check.py --run runs/quickstart

test: lint
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pydoclint --quiet framebridge_plugin

# torch first: pip then takes the build that fits this machine, and the packages that need it find it there.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) runs quickstart-data
