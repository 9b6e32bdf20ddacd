"""Settings that every test needs."""

import os

# There is no model hub in the tests: a look-up that would leave the machine must fail at once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Tests import diffusers directly, as a user's program would after importing our pipeline.
from framebridge_plugin.torchvision_repair import ensure_torchvision_operators

ensure_torchvision_operators()
