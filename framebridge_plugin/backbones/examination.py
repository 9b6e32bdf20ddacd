"""A saved model, examined once without loading it: what it is, where its components lie, what is wrong with it.

Recipes, `finetrainers sample` and `from_pretrained` ask it alike. Needs the standard library alone.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from framebridge_plugin.backbones.facts import BackboneFacts, ClipRule, KnownClasses, broken_backbones
from framebridge_plugin.backbones.files import (
    Reader,
    entry_problem,
    folder_weights_problem,
    links_problem,
    read_if_whole,
    read_json,
    tokenizer_problem,
)
from framebridge_plugin.backbones.folders import (
    LORA_INFO_FILE,
    backbone_of,
    config_problem,
    find_saved_model,
    is_present,
    pipeline_class,
    place_problem,
)
from framebridge_plugin.backbones.lora_folders import (
    HOW_TO_SAY_BASE,
    LoraInfo,
    lora_problem,
    other_base_error,
    read_lora_info,
)
from framebridge_plugin.backbones.manifest import MANIFEST_FILE, DamagedError, Manifest, check_folder, read_manifest
from framebridge_plugin.errors import FrameBridgeError
from framebridge_plugin.files import local_path

Locator = Callable[[str, str | None], Path | None]
"""The folder of a source (a folder, or a hub id at a revision); None if it is not on this machine."""


class Finding(NamedTuple):
    """Something that is wrong with a model.

    Attributes:
        part: The component that it concerns; "" for the whole model (of a LoRA, its base model), "lora" for the LoRA.
        message: What is wrong, and what to do.
        is_other: Whether something else is there, and not just a file missing or damaged.
    """

    part: str
    message: str
    is_other: bool = False


@dataclass(frozen=True)
class SavedModel(os.PathLike):
    """A model's components on the disk.

    Attributes:
        facts: What it is, or should be.
        base: The folder of a whole model: its own, or that of a LoRA's base model; None if it is not on this machine,
            or all components come from elsewhere.
        components: Folders of the components that are taken in place of the base's; None for those that are not on
            this machine, or are there in memory.
        lora: The folder of the LoRA to load into them, if it is one.
        info: What the LoRA's folder says.
        base_is_given: Whether somebody said where the LoRA's base model is.
        on_hub: Whether the base is not on this machine, and so not to be seen.
        read: What reads JSON files, each once.
    """

    facts: BackboneFacts
    base: Path | None
    components: Mapping[str, Path | None] = field(default_factory=dict)
    lora: Path | None = None
    info: LoraInfo | None = None
    base_is_given: bool = False
    on_hub: bool = False
    read: Reader = read_json

    def __fspath__(self) -> str:
        return str(self.lora or self.base)

    def folder(self, part: str) -> Path | None:
        """A component's folder; None if it is not on this machine."""
        if part in self.components:
            return self.components[part]
        return None if self.base is None else self.base / part

    @functools.cached_property
    def parts(self) -> tuple[str, ...]:
        """The names of its components."""
        there = [
            part
            for part in self.facts.optional_parts
            if part in self.components or self.on_hub or (self.base is not None and (self.base / part).is_dir())
        ]
        return *self.facts.parts, *there

    @functools.cached_property
    def configs(self) -> dict[str, dict[str, Any]]:
        """The config of each component; an empty one where it is not to be seen, or is not what it should be."""
        wrong = {finding.part for finding in self._own_findings}
        folders = {
            part: None if part in wrong or ("" in wrong and part not in self.components) else self.folder(part)
            for part in self.parts
        }
        for part in self.facts.optional_parts:
            if (network := self.components.get(part)) is not None:
                folders[f"{part}/vae"] = network.parent / "vae"
        return {
            part: {} if folder is None else read_if_whole(folder / "config.json", self.read)
            for part, folder in folders.items()
        }

    @property
    def clip_rule(self) -> ClipRule:
        """Which clips it takes, as far as its configs tell."""
        return self.facts.clip_rule(self.configs.get("vae", {}), self.configs[self.facts.network])

    @property
    def known_classes(self) -> KnownClasses | None:
        """The classes that it knows; None for a model that takes text, and one that is not to be seen."""
        return self.facts.known_classes(self.configs[self.facts.network])

    @property
    def takes_no_image(self) -> bool:
        """Whether the network is still one for text alone, and was not widened for the image."""
        config, has_to_be_widened = self.configs[self.facts.network], self.facts.input_projection is not None
        channels = config.get("in_channels")
        return has_to_be_widened and channels is not None and channels == config.get("out_channels")

    def findings(self, scratch_config: Mapping[str, Any] | None = None) -> Iterator[Finding]:
        """All that is wrong with its files, their configs, and with how they fit each other."""
        found = list(self._file_findings(scratch_config))
        yield from found or self._manifest_findings()

    def _manifest_findings(self) -> Iterator[Finding]:
        """Files that are missing, or of another size than when they were written (settings may be changed by hand);
        those of replaced components aside.
        """
        for part, folder in (("lora", self.lora), ("", self.base)):
            if folder is not None and (folder / MANIFEST_FILE).is_file():
                try:
                    files = read_manifest(folder).files
                    own = {name: files[name] for name in files if name.partition("/")[0] not in self.components}
                    check_folder(folder, Manifest(own), settings_too=False)
                except DamagedError as error:
                    remedy = f"copy the folder again, or remove its {MANIFEST_FILE} if this was changed on purpose"
                    yield self._in_words(Finding(part, f"{error}; {remedy}"))

    def _file_findings(self, scratch_config: Mapping[str, Any] | None) -> Iterator[Finding]:
        yield from map(self._in_words, self._own_findings)
        if any(not finding.part for finding in self._own_findings):
            return
        configs = self.configs if scratch_config is None else self.configs | {self.facts.network: scratch_config}
        for part, problem in self.facts.parts_problems(configs):
            if part in self.components or not self.on_hub:  # else it may be there or not
                place = self.folder(part) or f"the {part}"
                yield self._in_words(Finding(part, f"{place} {problem}", is_other=True))

    def other_base_problem(self) -> str | None:
        """That its base model is another one than the LoRA was trained on, as far as the LoRA knows."""
        if self.info is None or self.lora is None:
            return None
        folders = {part: self.folder(part) for part in self.info.fingerprint}
        there = {part: folder for part, folder in folders.items() if folder is not None and folder.is_dir()}
        difference = self.info.other_base_problem(there)
        return None if difference is None else other_base_error(self.lora, str(self.base), difference)

    @functools.cached_property
    def _own_findings(self) -> list[Finding]:
        """What is wrong with the folders, each looked at alone."""
        found = []
        if self.lora is not None and (problem := lora_problem(self.lora, self.facts)):
            found.append(Finding("lora", problem))
        whole = [] if self.base is None else list(self._base_findings(self.base))
        looked_at = [part for part in self.parts if part in self.components or not whole]
        return [*found, *whole, *(finding for part in looked_at for finding in self._part_findings(part))]

    def _base_findings(self, base: Path) -> Iterator[Finding]:
        title = self.facts.title
        if problem := place_problem(base) or entry_problem(base / "model_index.json", base):
            yield Finding("", problem)
        elif (base / LORA_INFO_FILE).is_file():
            yield Finding("", f"{base} is a LoRA itself; give the model that it was trained on", is_other=True)
        else:
            try:
                index = self.read(base / "model_index.json")
                name = pipeline_class(index)
            except ValueError as error:
                yield Finding("", f"{error}; give the folder of a whole {title} model in diffusers' format")
                return
            if title not in str(name):
                yield Finding("", f"{base} holds a {name}, not a {title} pipeline", is_other=True)
                return
            if problem := self.facts.config_problem("model_index.json", index) or self._index_problem(index):
                yield Finding("", f"{base} {problem}", is_other=True)
                return
            other = backbone_of(base, self.read)
            if other is not None and other != self.facts and not (base / self.facts.network).is_dir():
                yield Finding("", f"{base} is a model of {other.name}, not of {self.facts.name}", is_other=True)

    def _index_problem(self, index: Mapping[str, Any]) -> str | None:
        """That it is to be put together of other classes than those of its backbone, which diffusers would load."""
        libraries = ("diffusers", "transformers", "framebridge_plugin", self.facts.adapter.partition(".")[0])
        for part, wanted in {**self.facts.parts, **self.facts.optional_parts}.items():
            if not is_present(part, index):
                continue
            library, name = index[part] if len(index[part]) == 2 else (None, None)
            if str(library).partition(".")[0] not in libraries or wanted not in (None, name):
                return f"says that its {part} is {index[part]}, not a {wanted or part} of diffusers or transformers"
        return None

    def _part_findings(self, part: str) -> Iterator[Finding]:
        folder = self.folder(part)
        if folder is None:
            return
        own = self.base if part not in self.components else None
        if problem := (own and entry_problem(folder, own)) or place_problem(folder):
            yield Finding(part, problem)
            return
        file = folder / ("scheduler_config.json" if part == "scheduler" else "config.json")
        is_alone = part in self.components and part != "tokenizer"
        if is_alone and not file.is_file() and (folder.name != part or find_saved_model(folder)):
            yield self._absence(part, folder)
            return
        if problem := links_problem(folder):
            yield Finding(part, problem)
            return
        if part == "tokenizer":
            if problem := tokenizer_problem(folder, self.read):
                yield Finding(part, problem)
            return
        try:
            config = self.read(file)
        except ValueError as error:
            yield Finding(part, str(error))
            return
        if problem := config_problem(config, part, self.facts):
            yield Finding(part, f"{folder} {problem}", is_other=True)
        elif part != "scheduler" and (problem := folder_weights_problem(folder, config, self.read)):
            yield Finding(part, problem)

    def _absence(self, part: str, folder: Path) -> Finding:
        """That a folder, of a run or a model, does not have the component that is to be taken from it."""
        found = find_saved_model(folder)
        if found is None:
            return Finding(
                part, f"{folder} has no config.json, and holds no saved model with a {part}/; check the name"
            )
        index = read_if_whole(found / "model_index.json", self.read)
        facts = backbone_of(found, self.read)
        what = f"{facts.title if facts else 'foreign'} model without {part}/"
        is_other = (found / LORA_INFO_FILE).is_file() or (bool(index) and not is_present(part, index))
        return Finding(part, f"{folder} holds a {what}; give the folder of a run that has one", is_other)

    def _in_words(self, finding: Finding) -> Finding:
        """Adds to what is wrong with a LoRA's base model or components that it is theirs."""
        if self.info is None or finding.part == "lora" or (self.base_is_given and finding.part not in self.components):
            return finding
        if finding.part in self.components:
            remedy = f"put it back, or correct its place in {LORA_INFO_FILE}"
            return finding._replace(message=f"{self.lora}: its {finding.part}: {finding.message}; {remedy}")
        remedy = f"say where it is now ({HOW_TO_SAY_BASE})"
        return finding._replace(message=f"{self.lora}: its base model: {finding.message}; {remedy}")


def read_once() -> Reader:
    """A `read_json` that reads each file once: one for each command, as files change between them."""
    return functools.cache(read_json)


def examine(
    folder: Path,
    *,
    locate: Locator = lambda source, revision: local_path(source),
    base: str | None = None,
    components: Mapping[str, Path | None] | None = None,
    read: Reader | None = None,
) -> SavedModel:
    """Finds what belongs to the folder of a model or a LoRA; what is wrong with it, the result says itself."""
    read, given = read or read_once(), dict(components or {})
    facts, is_lora = backbone_of(folder, read), (folder / LORA_INFO_FILE).is_file()
    info = read_lora_info(folder, read) if is_lora else None
    if facts is None:
        raise FrameBridgeError(_unknown_kind(folder, info, read))
    if info is None:
        return SavedModel(facts, folder, given, read=read)
    source = base or info.base_model
    path = locate(source, None if base else info.revision) if source else None
    if base is not None and path is not None:
        path = find_saved_model(path) or path
    for part, name in info.replaced_components.items():
        found = None if part in given else locate(name, info.replaced_revisions.get(part))
        # A neural prior on the hub is a model's id, its folder is the network's.
        given[part] = found / part if found is not None and (found / part).is_dir() else found
    on_hub = bool(source) and path is None
    return SavedModel(facts, path, given, folder, info, base is not None, on_hub, read)


def _unknown_kind(folder: Path, info: LoraInfo | None, read: Reader) -> str:
    if info is not None:
        what, name, index = "is a LoRA for a", info.pipeline_class, {}
    else:
        try:
            index = read(folder / "model_index.json")
        except ValueError as error:
            return f"{error}; copy the model again"
        what, name = "holds a", pipeline_class(index)
    if not str(name).startswith("FrameBridge"):
        return f"{folder} {what} {name}, which is no FrameBridge model"
    packages = {str(entry[0]).partition(".")[0] for entry in index.values() if isinstance(entry, list) and entry}
    packages -= {"None", "diffusers", "transformers", "framebridge_plugin"}
    brought = f" ({', '.join(sorted(packages))})" if packages else ""
    remedy = "; ".join(broken_backbones()) or f"install the package that brings it{brought}"
    return f"{folder} {what} {name}, whose backbone is not installed or does not work here: {remedy}"
