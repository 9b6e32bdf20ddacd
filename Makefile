# Each of the two goals does everything on a fresh machine: virtual environment, constraints, and the job itself.
#   make quickstart   the main job: fine-tune a tiny CogVideoX into a FrameBridge model on real clips, and sample
#   make test         lint, types, docstrings and all tests

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Threads that wait asleep: with other programs on the machine, spinning ones take ten times as long.
export OMP_WAIT_POLICY = PASSIVE

.PHONY: quickstart test lint clean

# The first frame of the scene that nothing was trained on.
quickstart: IMAGE = quickstart-data/images/carphone_pristine-040-centre.png
quickstart: export HF_HUB_OFFLINE = 1
quickstart: $(STAMP)
	$(BIN)/python examples/quickstart/prepare_clips.py --output quickstart-data
	rm -rf runs/quickstart
	$(BIN)/finetrainers train --recipe recipes/quickstart.yaml
	$(BIN)/finetrainers sample --model runs/quickstart --image $(IMAGE) --prompt "a man in a dark suit talks in a driving car" \
		--output runs/quickstart/sample.mp4 --guidance-scale 1
	$(BIN)/python examples/quickstart/check.py --model-before examples/quickstart/model --run runs/quickstart \
		--heldout quickstart-data/heldout --sample runs/quickstart/sample.mp4 --image $(IMAGE)
	@echo "Look at, in runs/quickstart/:"
	@echo "  loss.png                                  the loss of the run"
	@echo "  validation/final-00.mp4, final-00.png     a sample of the run's own validation, and its contact sheet"
	@echo "  sample.mp4, sample.png                    the sample of a scene that nothing was trained on"
	@echo "  check.png                                 real clips, the autoencoder's reconstructions, and samples"

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
