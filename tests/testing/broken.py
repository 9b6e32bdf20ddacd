"""Specifications that break one promise each, small subclasses of a whole one, with what the suite says of them."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DDPMScheduler
from safetensors.torch import load_file, save_file
from torch import nn

from framebridge_plugin import register
from framebridge_plugin.training import LatteBridgeSpecification

register()

from finetrainers.models import ModelSpecification  # noqa: E402

CASES: list[tuple[str, str, type]] = []
"""(check, part of the message, class)"""


class Whole(LatteBridgeSpecification):
    """Conforms; made without arguments."""

    folder: Path

    def __init__(self) -> None:
        super().__init__(str(self.folder))


def fails(check: str, message: str) -> Any:
    def add(cls: type) -> type:
        CASES.append((check, message, cls))
        return cls

    return add


# interface


@fails("interface", "is no subclass of finetrainers' ModelSpecification")
class NoSpecification:
    transformer_config: ClassVar = {}
    vae_config: ClassVar = {}


@fails("interface", "forward is not implemented")
class WithoutForward(Whole):
    forward = ModelSpecification.forward


@fails("interface", "prepare_latents.* cannot be called as the trainers call it: got an unexpected keyword")
class TakesNoOtherColumns(Whole):
    def prepare_latents(self, vae, video, generator=None, compute_posterior=True):
        return super().prepare_latents(vae, video, generator)


@fails(
    "interface",
    "validation.* cannot be called as the trainers call it: missing a required argument: 'negative_prompt'",
)
class ValidatesWithMore(Whole):
    def validation(self, pipeline, negative_prompt, **kwargs):
        return super().validation(pipeline, **kwargs)


@fails("interface", "_save_lora_weights takes transformer_state_dict for transformer: the trainers pass directory, ")
class SavesInTheOrderOfTheBaseClass(Whole):
    def _save_lora_weights(self, directory, transformer, transformer_state_dict=None, scheduler=None, metadata=None):
        super()._save_lora_weights(directory, transformer_state_dict, scheduler, metadata)


@fails("interface", "_resolution_dim_keys is .*latents")
class NamesNoDimensions(Whole):
    _resolution_dim_keys: ClassVar = {"latents": ("frames", "height", "width")}


# models


@fails("models", "load_latent_models returns autoencoder, which the trainers drop; they know .*vae")
class NamesModelsItsOwnWay(Whole):
    def load_latent_models(self):
        return {"autoencoder": super().load_latent_models()["vae"]}


@fails("models", "load_diffusion_models returns no scheduler")
class WithoutScheduler(Whole):
    def load_diffusion_models(self):
        return {"transformer": super().load_diffusion_models()["transformer"]}


@fails("models", "transformer is loaded in torch.float32 where torch.bfloat16 is asked for")
class LoadsInFloat32(Whole):
    def load_diffusion_models(self):
        models = super().load_diffusion_models()
        models["transformer"].float()
        return models


@fails("models", "vae is loaded in training mode")
class LeavesModelsInTrainingMode(Whole):
    def load_latent_models(self):
        return {"vae": super().load_latent_models()["vae"].train()}


@fails("models", r"transformer differs from one load to the next: \S*weight has other values")
class DrawsWeights(Whole):
    count = itertools.count()

    def load_diffusion_models(self):
        models = super().load_diffusion_models()
        nn.init.constant_(models["transformer"].transformer_blocks[0].attn.to_q.weight, next(self.count))
        return models


@fails("models", "finetrainers cannot train with the scheduler: .*DDPMScheduler")
class HasAStrangeScheduler(Whole):
    def load_diffusion_models(self):
        return {**super().load_diffusion_models(), "scheduler": DDPMScheduler()}


# conditions, latents and batches


@fails("conditions", r"prepare_conditions: class_labels \[\] is no batch of one")
class GivesNoBatch(Whole):
    def prepare_conditions(self, **kwargs):
        return {"class_labels": super().prepare_conditions(**kwargs)["class_labels"][0]}


@fails("conditions", "prepare_conditions: count is another with the same sample and generator")
class Counts(Whole):
    count = itertools.count()

    def prepare_conditions(self, **kwargs):
        return {**super().prepare_conditions(**kwargs), "count": torch.tensor([next(self.count)])}


@fails("conditions", "prepare_conditions: what it returns cannot be precomputed, torch.load refuses it")
class GivesModelsBack(Whole):
    def prepare_conditions(self, **kwargs):
        return {**super().prepare_conditions(**kwargs), "embedder": nn.Linear(1, 1)}


@fails("latents", "the trainers read 'latents', but there is only .*image_latents")
class NamesLatentsItsOwnWay(Whole):
    def prepare_latents(self, **kwargs):
        prepared = super().prepare_latents(**kwargs)
        return {"video_latents": prepared["latents"], "image_latents": prepared["image_latents"]}


@fails("latents", "prepare_latents: latents has values that are not finite")
class Divides(Whole):
    def prepare_latents(self, **kwargs):
        prepared = super().prepare_latents(**kwargs)
        return {**prepared, "latents": prepared["latents"] / 0.0}


@fails("latents", "prepare_latents: latents carries a graph")
class KeepsTheGraph(Whole):
    def prepare_latents(self, **kwargs):
        prepared = super().prepare_latents(**kwargs)
        return {**prepared, "latents": prepared["latents"].requires_grad_()}


@fails("latents", r"_resolution_dim_keys says \(1, 4, 5\) of 'latents', which has 5 dimensions")
class CountsDimensionsFromOne(Whole):
    _resolution_dim_keys: ClassVar = {"latents": (1, 4, 5)}


@fails("collation", "collate_latents loses image_latents")
class CollatesLatentsAlone(Whole):
    def collate_latents(self, data):
        return {"latents": super().collate_latents(data)["latents"]}


@fails("collation", "collate_conditions: class_labels is not the samples one after the other")
class Reverses(Whole):
    def collate_conditions(self, data):
        return super().collate_conditions(data[::-1])


@fails("collation", "two clips of one size have latents of two sizes")
class CropsAtRandom(Whole):
    rows = itertools.cycle((8, 6))

    def prepare_latents(self, **kwargs):
        prepared = super().prepare_latents(**kwargs)
        return {**prepared, "latents": prepared["latents"][..., : next(self.rows), :]}


# forward


class Forward(Whole):
    def change(self, prediction, target, sigmas):
        raise NotImplementedError

    def forward(self, **kwargs):
        return self.change(*super().forward(**kwargs))


@fails("forward", r"forward returns no \(prediction, target, sigmas\)")
class ReturnsTheLoss(Forward):
    def change(self, prediction, target, sigmas):
        return (prediction - target).square().mean()


@fails("forward", "prediction and target differ in shape")
class PredictsTheImageToo(Forward):
    def change(self, prediction, target, sigmas):
        return torch.cat([prediction[:, :1], prediction], dim=1), target, sigmas


@fails("forward", "of two samples, prediction and target have")
class AveragesTheBatch(Forward):
    def change(self, prediction, target, sigmas):
        return prediction.mean(0, keepdim=True), target.mean(0, keepdim=True), sigmas


@fails("forward", r"target \(torch.float32 network\) has values that are not finite")
class TakesLogarithms(Forward):
    def change(self, prediction, target, sigmas):
        return prediction, target.log(), sigmas


@fails("forward", "the prediction has no gradient")
class Detaches(Forward):
    def change(self, prediction, target, sigmas):
        return prediction.detach(), target, sigmas


@fails("forward", "the target has a gradient")
class MovesTheTarget(Forward):
    def change(self, prediction, target, sigmas):
        return prediction, target + 0.1 * prediction, sigmas


@fails("forward", "no gradient for unused.weight: training on several processes stops")
class HasUnusedWeights(Whole):
    def load_diffusion_models(self):
        models = super().load_diffusion_models()
        models["transformer"].unused = nn.Linear(1, 1, bias=False, dtype=self.transformer_dtype)
        return models


@fails("loss-falls", r"from \S+ the loss comes to \S+ in 20 updates")
class ClimbsTheLoss(Forward):
    def change(self, prediction, target, sigmas):
        return 2 * prediction.detach() - prediction, target, sigmas


@fails("loss-falls", r"from \S+ the loss comes to \S+ in 20 updates")
class AsksForWhatIsFarAway(Forward):
    def change(self, prediction, target, sigmas):
        return prediction, target + 100.0, sigmas


# saving


@fails("model-round-trip", r"the saved model is not the trained one: \S*weight has other values")
class SavesTheNetworkInPlaceOfTheStateDict(Whole):
    def _save_model(self, directory, transformer, transformer_state_dict=None, scheduler=None):
        super()._save_model(directory, transformer, transformer.state_dict(), scheduler)


@fails("model-round-trip", "the saved scheduler has another target")
class SavesAnotherScheduler(Whole):
    def _save_model(self, directory, transformer, transformer_state_dict=None, scheduler=None):
        scheduler = type(scheduler).from_config(scheduler.config, target="data")
        super()._save_model(directory, transformer, transformer_state_dict, scheduler)


@fails("model-round-trip", "_save_model writes no folder transformer, only .*model_index.json")
class SavesElsewhere(Whole):
    def _save_model(self, directory, transformer, transformer_state_dict=None, scheduler=None):
        super()._save_model(directory, transformer, transformer_state_dict, scheduler)
        (Path(directory) / "transformer").rename(Path(directory) / "network")


@fails("reopening", r"goes on with other weights: \S*weight has other values")
class AlwaysLoadsTheFirstModel(Whole):
    def _load_configs(self):
        self.pretrained_model_name_or_path = str(self.folder)
        super()._load_configs()


@fails("reopening", r"cannot load what was saved \(FrameBridgeError: cannot load .*config.json")
class SavesNoConfig(Whole):
    def _save_model(self, directory, transformer, transformer_state_dict=None, scheduler=None):
        super()._save_model(directory, transformer, transformer_state_dict, scheduler)
        (Path(directory) / "transformer/config.json").unlink()


@fails("lora-export", "gets other LoRA layers: .*is missing")
class LosesALayer(Whole):
    def _save_lora_weights(self, directory, transformer_state_dict=None, scheduler=None, metadata=None):
        kept = {name: tensor for name, tensor in transformer_state_dict.items() if "blocks.1" not in name}
        super()._save_lora_weights(directory, kept, scheduler, metadata)


@fails("lora-export", r"gets other LoRA layers: \S*ff\S*lora_\S* is too many")
class SavesALayerTooMany(Whole):
    def _save_lora_weights(self, directory, transformer_state_dict=None, scheduler=None, metadata=None):
        layer = "transformer_blocks.0.ff.net.2"
        more = {f"{layer}.lora_A.weight": torch.zeros(4, 64), f"{layer}.lora_B.weight": torch.zeros(16, 4)}
        super()._save_lora_weights(directory, transformer_state_dict | more, scheduler, metadata)


@fails("lora-export", r"the pipeline with the LoRA is not the trained network: \S*bias has other values")
class TrainsMoreThanItSaves(Whole):
    def prepare_trainable_parameters(self, transformer, training_type):
        transformer.transformer_blocks[0].attn.to_q.bias.requires_grad_(True)


@fails("lora-alpha", "gets a LoRA of scale 1.0 for 2.0: alpha is lost")
class LosesAlpha(Whole):
    def _save_lora_weights(self, directory, transformer_state_dict=None, scheduler=None, metadata=None):
        super()._save_lora_weights(directory, transformer_state_dict, scheduler, metadata)
        for file in Path(directory).glob("*.safetensors"):
            save_file(load_file(file), file)


# runs


@fails("run-full-accelerate", r"the saved model is not the trained one: \S* has other values")
class SavesOnlyOnce(Whole):
    saved: Path | None = None

    def _save_model(self, directory, transformer, transformer_state_dict=None, scheduler=None):
        if self.saved is None:
            super()._save_model(directory, transformer, transformer_state_dict, scheduler)
            self.saved = Path(directory)
        else:
            shutil.copytree(self.saved, directory)


@fails("run-lora-ptd", r"gets other LoRA layers: \S* has other values")
class SavesTheFirstLoraAgain(Whole):
    first: dict | None = None

    def _save_lora_weights(self, directory, transformer_state_dict=None, scheduler=None, metadata=None):
        self.first = self.first or {name: tensor.clone() for name, tensor in transformer_state_dict.items()}
        super()._save_lora_weights(directory, self.first, scheduler, metadata)


@fails("run-full-ptd-precomputed", "gradient checkpointing does nothing: finetrainers finds blocks by the names")
class HidesItsBlocks(Whole):
    def load_diffusion_models(self):
        models = super().load_diffusion_models()
        # As if they had another name: finetrainers does not see them.
        models["transformer"].transformer_blocks.named_children = lambda: iter(())
        return models


@fails("run-full-accelerate-precomputed", "a loss is not finite")
class Explodes(Forward):
    def change(self, prediction, target, sigmas):
        return prediction * float("inf"), target, sigmas


@fails("run-lora-accelerate", "no validation sample was written")
class ShowsNothing(Whole):
    def validation(self, pipeline, **kwargs):
        return []


@fails("run-full-ptd", r"RuntimeError: out of order \(raised in validation, .*broken.py:\d+\)")
class FailsToValidate(Whole):
    def validation(self, pipeline, **kwargs):
        raise RuntimeError("out of order")


@fails("run-lora-accelerate-precomputed", r"KeyError: 'image_latents'")
class KeepsWhatCannotBePrecomputed(Whole):
    def prepare_latents(self, compute_posterior=True, **kwargs):
        prepared = super().prepare_latents(**kwargs)
        return prepared if compute_posterior else {"latents": prepared["latents"]}


@fails("run-lora-ptd-precomputed", "training moved the output by only")
class TrainsNothing(Forward):
    def change(self, prediction, target, sigmas):
        return prediction * 0.0 + prediction.detach(), target, sigmas
