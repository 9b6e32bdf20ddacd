"""What fails in finetrainers' own specifications for reasons of their own, as far as it has been seen."""

from __future__ import annotations

from framebridge_plugin.testing.outcome import KnownFault

_COGVIDEOX = "finetrainers.models.cogvideox.base_specification.CogVideoXModelSpecification"

KNOWN_FAULTS: dict[str, dict[str, KnownFault]] = {
    _COGVIDEOX: {
        "reopening": KnownFault(
            "finetrainers takes the class name in a transformer's config.json for a pair of module and class, so no "
            "specification can start from a transformer folder alone, and its own saves nothing else",
            r"No module named 'C'",
        ),
        "lora-alpha": KnownFault(
            "finetrainers writes lora_alpha under a key of the file's header that diffusers does not read; its own "
            "`finetrainers.patches.load_lora_weights` does",
            r"alpha is lost",
        ),
    },
}
"""Known faults by check, for a class by its full name; a subclass has none unless it says so itself."""


def known_faults_of(specification_class: type) -> dict[str, KnownFault]:
    """The known faults of a specification.

    Args:
        specification_class: Its class.

    Returns:
        Faults by name of the check; empty for a class that is not in `KNOWN_FAULTS`.
    """
    return KNOWN_FAULTS.get(f"{specification_class.__module__}.{specification_class.__qualname__}", {})
