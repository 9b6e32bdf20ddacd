# Each of these goals does everything on a fresh machine: virtual environment, exact versions, and the job itself.
#   make quickstart       the main job: fine-tune a tiny CogVideoX into a FrameBridge model on real clips, and sample
#   make ucf101-example   from scratch: neural prior, bridge, and bridge on the neural prior, on clips with classes
#   make test             lint, types, docstrings and all tests
#   make wheel            dist/framebridge_plugin-*.whl, which `pip install` takes after torch
#   make pins             after a version in requirements/ was changed by hand: the hashes of its files

PYTHON ?= python3.11
# torch's own requirements are pinned too, but for the libraries that its CUDA build brings: --no-deps leaves those out.
TORCH_OPTIONS ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DIST := dist

# Threads that wait asleep: with other programs on the machine, spinning ones take ten times as long.
export OMP_WAIT_POLICY = PASSIVE

.PHONY: quickstart ucf101-example test lint wheel pins clean

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
	$(BIN)/finetrainers report --run runs/quickstart
	@echo "Look at, in runs/quickstart/:"
	@echo "  report.html                               curves and samples of the run, in a browser"
	@echo "  loss.png                                  the loss of the run"
	@echo "  validation/final-00.mp4, final-00.png     a sample of the run's own validation, and its contact sheet"
	@echo "  sample.mp4, sample.png                    the sample of a scene that nothing was trained on"
	@echo "  check.png                                 real clips, the autoencoder's reconstructions, and samples"

# A clip of the scene that nothing was trained on; its first frame is the image.
ucf101-example: IMAGE = ucf101-data/heldout/PanLeft/v_PanLeft_g08_c01.avi
ucf101-example: export HF_HUB_OFFLINE = 1
ucf101-example: $(STAMP)
	$(BIN)/python examples/ucf101/prepare_motion.py --output ucf101-data
	rm -rf runs/motion_neural_prior runs/motion_bridge runs/motion_bridge_neural_prior runs/motion_check
	$(BIN)/finetrainers train --recipe recipes/motion_neural_prior.yaml
	$(BIN)/finetrainers train --recipe recipes/motion_bridge.yaml
	$(BIN)/finetrainers train --recipe recipes/motion_bridge_neural_prior.yaml
	$(BIN)/finetrainers sample --model runs/motion_bridge_neural_prior --image $(IMAGE) --class-name PanLeft \
		--output runs/motion_check/sample.mp4 --steps 50 --guidance-scale 1
	$(BIN)/python examples/ucf101/check.py --neural-prior runs/motion_neural_prior --bridge runs/motion_bridge \
		--bridge-neural-prior runs/motion_bridge_neural_prior --heldout ucf101-data/heldout --output runs/motion_check
	@echo "Look at, in runs/:"
	@echo "  motion_*/loss.png               the losses of the three runs"
	@echo "  motion_check/sample.mp4, .png   a sample from an image of the scene that nothing was trained on"
	@echo "  motion_check/check.png          held-out clips, and what the autoencoder and the three models make of them"

# Two processes of one thread each: most tests wait for a process that they start. Files in the order of tests/conftest.py.
# One that crashes ends the tests: xdist would start another in its place, and then wait for ever.
test: lint
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder \
		--max-worker-restart 0

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pydoclint --quiet framebridge_plugin

wheel: $(STAMP)
	rm -rf $(DIST)
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir $(DIST) .
	@ls $(DIST)/*.whl

# What is installed has the hash that is written here. torch has none: pip takes the build that fits this machine.
$(STAMP): pyproject.toml requirements/runtime.txt requirements/test.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes -r requirements/runtime.txt -r requirements/test.txt
	$(BIN)/python -m pip install --quiet $(TORCH_OPTIONS) torch==2.13.0
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $(STAMP)

pins: export UV_CUSTOM_COMPILE_COMMAND = make pins
pins: $(STAMP)
	$(BIN)/python -m pip install --quiet uv==0.13.9
	for file in requirements/runtime.txt requirements/test.txt; do \
		grep -oE '^[[:alnum:]._-]+==[^ ]+' $$file > $(VENV)/pins.in && $(BIN)/uv pip compile --quiet --no-deps \
			--generate-hashes --no-annotate --python-version 3.11 --output-file $$file $(VENV)/pins.in || exit 1; \
	done

clean:
	rm -rf $(VENV) $(DIST) runs quickstart-data ucf101-data
