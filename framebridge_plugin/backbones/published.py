"""The sizes of published models, for computing what a run takes before they are downloaded."""

from __future__ import annotations

import json
from pathlib import Path

_SCHEDULER = "scheduler"


def write_published(name: str, folder: Path) -> bool:
    """Writes the configs of a published model of the Hugging Face Hub, of what concerns its size; False if unknown.

    Args:
        name: Its id.
        folder: An empty folder, which becomes a model's in diffusers' format but for weights and tokenizer.

    Returns:
        Whether the model is known.
    """
    facts = json.loads(Path(__file__).with_name("published.json").read_text())
    parts = dict(facts["models"].get(name, {}))
    if pipeline := parts.pop("pipeline", None):
        (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    for part, config in parts.items():
        (folder / part).mkdir(exist_ok=True)
        file = f"{part}_config.json" if part == _SCHEDULER else "config.json"
        (folder / part / file).write_text(json.dumps(facts["configs"][config]))
    return bool(parts)
