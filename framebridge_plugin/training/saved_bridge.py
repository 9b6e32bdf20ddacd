"""What a run of a specification leaves behind: a model's folder or LoRA layers, with what training left as it was."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

from framebridge_plugin.backbones.adapter import BackboneAdapter
from framebridge_plugin.backbones.copying import run_copy
from framebridge_plugin.backbones.lora_folders import LoraInfo
from framebridge_plugin.backbones.saving import describe_base, save_lora_folder, save_model_folder
from framebridge_plugin.models.projection_adapter import full_rank_settings, with_identity


class SavedBridge:
    """How a `BridgeSpecification` is saved."""

    adapter: BackboneAdapter
    clip_rate: float | None
    clip_shape: Any
    network_name: Any
    pretrained_model_name_or_path: str
    _run_copies: dict[str, Path]

    def frozen_components(self, training_type: str) -> dict[str, Path]:
        """The folders of what training leaves as it is; with LoRA layers the network is one of them."""
        names = [self.network_name] if training_type == "lora" else []
        return {name: self.adapter.folder(name) for name in [*names, *self.adapter.frozen_parts()]}

    def keep_components(self, folder: Path) -> None:
        """Copies what training leaves as it is into `folder`, unless it is there; models are saved with that."""
        frozen = self.frozen_components("full-finetune")
        self._run_copies = {name: run_copy(folder, name, source) for name, source in frozen.items()}

    def _save_model(
        self, directory: str, transformer: Any, transformer_state_dict: Any = None, scheduler: Any = None
    ) -> None:
        save_model_folder(
            directory,
            pipeline_class=self._pipeline_name,
            network_name=self.network_name,
            network_class=self.adapter.network_class,
            network_config=transformer.config,
            network_state_dict=transformer_state_dict,
            scheduler=scheduler if "scheduler" in self.adapter.facts.parts else None,
            components={
                name: (*self.adapter.part_class(name), folder)
                for name, folder in (self._run_copies or self.frozen_components("full-finetune")).items()
            },
            are_run_copies=bool(self._run_copies),
            settings=self.adapter.pipeline_settings() | self._rate_setting,
        )

    def _save_lora_weights(
        self, directory: str, transformer_state_dict: Any = None, scheduler: Any = None, metadata: Any = None
    ) -> None:
        layers, settings = dict(transformer_state_dict), json.loads(metadata["lora_config"])
        if (projection := self.adapter.facts.input_projection) is not None:
            weight: Any = self.adapter.blank_network().get_submodule(projection).weight
            layers = with_identity(layers, projection, tuple(weight.shape[2:]))
            settings |= full_rank_settings(projection, weight[0].numel(), settings["target_modules"])
        save_lora_folder(
            directory,
            info=dataclasses.replace(self._lora_info, fps=self.clip_rate),
            lora_state_dict=layers,
            adapter_metadata=settings,
            scheduler=scheduler if "scheduler" in self.adapter.facts.parts else None,
        )

    @functools.cached_property
    def _lora_info(self) -> LoraInfo:
        """What a LoRA remembers of its base, as it was when it was loaded."""
        folders = self.frozen_components("lora")
        components = {name: (self.adapter.place(name)[0], folder) for name, folder in folders.items()}
        num_frames, height, width = self.clip_shape or (None, None, None)
        return LoraInfo(
            pipeline_class=self._pipeline_name,
            network_name=self.network_name,
            num_frames=num_frames,
            height=height,
            width=width,
            **describe_base(self.pretrained_model_name_or_path, components),
        )

    @property
    def _rate_setting(self) -> dict[str, float]:
        return {} if self.clip_rate is None else {"fps": self.clip_rate}

    @property
    def _pipeline_name(self) -> str:
        return self.adapter.facts.pipeline.partition(":")[2]
