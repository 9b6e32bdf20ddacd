"""What fails in finetrainers' own specifications for reasons of their own, as far as it has been seen."""

from __future__ import annotations

from framebridge_plugin.testing import runs
from framebridge_plugin.testing.outcome import KnownFault

_COMMON = {
    "reopening": KnownFault(
        "finetrainers takes the class name in a transformer's config.json for a pair of module and class, so no "
        "specification can start from a transformer folder alone, and its own save nothing else",
        r"No module named '[A-Z]'",
    ),
    "lora-alpha": KnownFault(
        "finetrainers writes lora_alpha under a key of the file's header that diffusers does not read; its own "
        "`finetrainers.patches.load_lora_weights` does",
        r"alpha is lost",
    ),
}
_BATCHES_OF_LTX = KnownFault(
    "finetrainers' LTX-Video shares the autoencoder's channel means out among the samples: batches of one alone work",
    r"raised in _normalize_latents",
)
_RUNS_OF_LTX = KnownFault(
    "the wheel of finetrainers 0.2.0 lacks the patch of LTX-Video's transformer without which it is not trained",
    r"patch_transformer_forward is missing from the finetrainers wheel",
)

KNOWN_FAULTS: dict[str, dict[str, KnownFault]] = {
    "finetrainers.models.cogvideox.base_specification.CogVideoXModelSpecification": _COMMON,
    "finetrainers.models.cogview4.base_specification.CogView4ModelSpecification": _COMMON,
    "finetrainers.models.wan.base_specification.WanModelSpecification": _COMMON,
    "finetrainers.models.ltx_video.base_specification.LTXVideoModelSpecification": {
        **_COMMON,
        **dict.fromkeys(("forward", "loss-falls", "lora-export", "lora-alpha"), _BATCHES_OF_LTX),
        **{check.name: _RUNS_OF_LTX for check in runs.CHECKS},
    },
}
"""Known faults by check, for a class by its full name; a subclass has none unless it says so itself."""


def known_faults_of(specification_class: type) -> dict[str, KnownFault]:
    """The known faults of a specification, by name of the check."""
    return KNOWN_FAULTS.get(f"{specification_class.__module__}.{specification_class.__qualname__}", {})
