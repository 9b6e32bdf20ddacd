"""A stranger's model: what belongs to a component, that nothing leads out of it, and that no file eats the machine."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from framebridge_plugin.backbones.cogvideox.adapter import load_bridge_transformer
from framebridge_plugin.backbones.cogvideox.facts import COGVIDEOX
from framebridge_plugin.backbones.copying import link_run_copy, link_tree, run_copy
from framebridge_plugin.backbones.examination import SavedModel
from framebridge_plugin.backbones.files import component_files, read_json, safetensors_header, weights_problem
from framebridge_plugin.backbones.fingerprint import component_fingerprint
from framebridge_plugin.backbones.loading import ModelSource, load_tokenizer, load_weights
from framebridge_plugin.backbones.manifest import FileFacts, file_facts, read_manifest, write_manifest
from framebridge_plugin.errors import FrameBridgeError
from tests.cogvideox_files import write_model_folder


def write(path: Path, text: str = "{}") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def names_of(folder: Path) -> list[str]:
    return [name for name, _ in component_files(folder)]


def test_what_belongs_to_a_component(tmp_path):
    tokenizer = ["added_tokens.json", "merges.txt", "spiece.model", "tokenizer.json", "tokenizer_config.json"]
    weights = ["config.json", "model-00001-of-00001.safetensors", "model.safetensors.index.json"]
    adapters = ["adapter_config.json", "tied_config.json"]
    strays = [
        *adapters,
        "id_rsa",
        ".env",
        ".config.json",
        "modeling.py",
        "notes.txt",
        "credentials.json",
        "old/config.json",
    ]
    pickles = ["training_args.bin", "pytorch_model.bin", "pytorch_model.bin.index.json"]
    for name in (*tokenizer, *weights, *strays, *pickles):
        write(tmp_path / name)
    assert names_of(tmp_path) == sorted([*tokenizer, *weights])


@pytest.mark.parametrize("name", ["config.json", "id_rsa", "chat_template.jinja", "templates/a.jinja"])
def test_a_link_that_leads_out_of_a_component(tmp_path, name):
    key = write(tmp_path / "home/key", "PRIVATE")
    write(tmp_path / "vae/config.json")
    (tmp_path / "vae" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "vae" / name).unlink(missing_ok=True)
    (tmp_path / "vae" / name).symlink_to(key)
    for read in (component_files, component_fingerprint):
        with pytest.raises(FrameBridgeError, match=r"is a link to .*key, outside its folder; put what it leads to"):
            read(tmp_path / "vae")


def test_links_that_are_followed(tmp_path):
    blob = write(tmp_path / "models--owner--name/blobs/0123")
    vae = tmp_path / "models--owner--name/snapshots/abc/vae"
    vae.mkdir(parents=True)
    (vae / "config.json").symlink_to("../../../blobs/0123")
    own = write(vae / "a.safetensors")
    (vae / "b.safetensors").symlink_to("a.safetensors")
    (tmp_path / "named").symlink_to(vae)
    for folder in (vae, tmp_path / "named"):
        assert component_files(folder) == [("a.safetensors", own), ("b.safetensors", own), ("config.json", blob)]
    (vae / "config.json").unlink()
    (vae / "config.json").symlink_to(write(tmp_path / "models--owner--other/blobs/0123"))
    with pytest.raises(FrameBridgeError, match="outside its folder"):
        component_files(vae)


def link_folder(copy: Path, home: Path) -> None:
    (copy / "dirlink").symlink_to(home)


def link_file(copy: Path, home: Path) -> None:
    (copy / "config.json").unlink()
    (copy / "config.json").symlink_to(home / "id_rsa")


def other_bytes(copy: Path, home: Path) -> None:
    weights = copy / "model.safetensors"
    weights.write_bytes(bytes(weights.stat().st_size))


def further_file(copy: Path, home: Path) -> None:
    write(copy / "sub/more.txt")
    write_manifest(copy)


def name_that_leads_out(copy: Path, home: Path) -> None:
    rewrite_manifest(copy, {os.path.relpath(home / "id_rsa", copy): file_facts(home / "id_rsa")})


def rewrite_manifest(folder: Path, further: dict[str, FileFacts]) -> None:
    """As `write_manifest` does, with files that are elsewhere."""
    content = {"files": {**read_manifest(folder).files, **further}, "written": 0}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    write(folder / "manifest.json", json.dumps({**content, "digest": digest}))


@pytest.mark.parametrize("change", [link_folder, link_file, other_bytes, further_file, name_that_leads_out])
def test_a_stranger_s_copy_of_a_component_is_made_anew(tmp_path, change):
    vae, home = write_model_folder(tmp_path / "model") / "vae", tmp_path / "home"
    write(home / "id_rsa", "{}")
    copy = run_copy(tmp_path / "components", "vae", vae)
    assert run_copy(copy.parent, "vae", vae) == copy
    made = copy.stat().st_ino
    change(copy, home)
    with contextlib.suppress(FrameBridgeError):  # a folder that is taken from as it is
        link_tree(copy, tmp_path / "taken")
    assert not list((tmp_path / "taken").rglob("id_rsa"))
    assert run_copy(copy.parent, "vae", vae).stat().st_ino != made
    link_run_copy(copy, tmp_path / "model2/vae")
    assert {path.name for path in (tmp_path / "model2").rglob("*")} == {"vae", "config.json", "model.safetensors"}
    assert component_fingerprint(tmp_path / "model2/vae") == component_fingerprint(vae)
    assert (home / "id_rsa").stat().st_nlink == 1


def test_folders_pipes_and_sockets(tmp_path):
    vae = write_model_folder(tmp_path / "model") / "vae"
    assert names_of(vae) == ["config.json", "model.safetensors"]
    (vae / "inside").mkdir()
    (vae / "again").symlink_to("inside")
    with pytest.raises(FrameBridgeError, match="again is a link to"):
        component_files(vae)
    (vae / "again").unlink()
    os.mkfifo(vae / "inside" / "a.jinja")
    with pytest.raises(FrameBridgeError, match=r"a.jinja is neither a file nor a folder; remove it"):
        component_files(vae)


def problem_of(model: Path) -> str:
    (finding,) = SavedModel(COGVIDEOX, model).findings()
    return finding.message


def test_a_model_that_leads_elsewhere(tmp_path):
    model, other = (write_model_folder(tmp_path / name) for name in ("model", "other"))
    (tmp_path / "named").symlink_to(model)
    assert not list(SavedModel(COGVIDEOX, tmp_path / "named").findings())
    (model / "vae").rename(tmp_path / "vae")
    (model / "vae").symlink_to(tmp_path / "vae")
    assert "vae is a link to" in problem_of(model)
    assert not list(SavedModel(COGVIDEOX, model, {"vae": model / "vae"}).findings())  # the user named it
    (other / "model_index.json").rename(tmp_path / "index.json")
    (other / "model_index.json").symlink_to(tmp_path / "index.json")
    assert "model_index.json is a link to" in problem_of(other)


@pytest.mark.parametrize(
    "entry", [["os", "system"], ["evil", "T5EncoderModel"], ["diffusers", "FluxTransformer2DModel"], ["diffusers"]]
)
def test_classes_that_a_model_may_not_name(tmp_path, entry):
    model = write_model_folder(tmp_path)
    index = {"_class_name": "CogVideoXPipeline", "transformer": ["diffusers", "CogVideoXTransformer3DModel"]}
    write(model / "model_index.json", json.dumps(index))
    assert not list(SavedModel(COGVIDEOX, model).findings())
    write(model / "model_index.json", json.dumps(index | {"transformer": entry}))
    assert f"its transformer is {entry}, not a CogVideoXTransformer3DModel of diffusers" in problem_of(model)


def test_json_that_is_too_deep_or_too_large(tmp_path):
    for depth in (60, 100_000):
        write(tmp_path / "deep.json", '{"a":' * depth + "1" + "}" * depth)
        with pytest.raises(ValueError, match=r"deep.json is not readable JSON \(it is nested too deeply\)"):
            read_json(tmp_path / "deep.json")
    write(tmp_path / "shallow.json", json.dumps({"a": [[[[1]]]] * 1000}))
    assert len(read_json(tmp_path / "shallow.json")["a"]) == 1000
    with (tmp_path / "large.json").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ValueError, match="it has more than 64 MiB"):
        read_json(tmp_path / "large.json")
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(ValueError, match="pipe.json is not a file"):
        read_json(tmp_path / "pipe.json")


@pytest.mark.parametrize(
    "header",
    [
        '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, "4"]}}',
        '{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4]}}',
        '{"a": 1}',
        "[]",
        '{"a":' * 100_000,
    ],
)
def test_headers_that_are_none(tmp_path, header):
    file = tmp_path / "a.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(4))
    assert safetensors_header(file) is None
    assert "is no safetensors file" in str(weights_problem(file))
    with file.open("wb") as opened:  # a header of 1 TiB, in a file that takes no room
        opened.write((2**40).to_bytes(8, "little"))
        opened.truncate(2**41)
    assert safetensors_header(file) is None


def test_weights_that_are_a_pickle_or_lie_elsewhere(tmp_path):
    model = write_model_folder(tmp_path)
    vae = model / "vae"
    index = write(
        vae / "model.safetensors.index.json", json.dumps({"weight_map": {"a": "../transformer/model.safetensors"}})
    )
    assert "is missing, although model.safetensors.index.json lists it" in problem_of(model)
    write(index, "[]")
    assert "model.safetensors.index.json lists no files" in problem_of(model)
    index.unlink()
    (vae / "model.safetensors").rename(vae / "diffusion_pytorch_model.bin")
    assert "holds weights as a pickle alone, which could run code" in problem_of(model)


def test_a_config_that_the_weights_cannot_be_of(tmp_path):
    model = write_model_folder(tmp_path)
    file = model / "transformer/config.json"
    config = json.loads(file.read_text())
    for name, value, is_wrong in (("num_layers", 1, False), ("num_layers", 2, True), ("text_embed_dim", 10**9, True)):
        write(file, json.dumps(config | {name: value}))
        assert bool(list(SavedModel(COGVIDEOX, model).findings())) == is_wrong
    save_file({str(number): np.zeros(1) for number in range(3)}, model / "transformer/model.safetensors")
    write(file, json.dumps(config | {"num_layers": 3}))
    assert not list(SavedModel(COGVIDEOX, model).findings())


@pytest.mark.parametrize(
    "values, message",
    [
        ({"attn_implementation": "owner/kernel"}, "has its attention from owner/kernel, code on the hub"),
        ({"_attn_implementation": {"": "owner/kernel@main:f"}}, "code on the hub"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "is quantized by mxfp4"),
        ({"quantization_config": "a"}, "is quantized by a"),
        ({"attn_implementation": "sdpa", "quantization_config": {"quant_method": "bitsandbytes"}}, None),
    ],
)
def test_a_config_that_names_code_elsewhere(tmp_path, values, message):
    model = write_model_folder(tmp_path)
    file = model / "text_encoder/config.json"
    write(file, json.dumps({**json.loads(file.read_text()), **values}))
    if message is None:
        assert not list(SavedModel(COGVIDEOX, model).findings())
    else:
        assert message in problem_of(model)


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_an_adapter_beside_the_weights(tmp_path, part):
    """transformers would add it, and match a stranger's pattern with each of the names of the layers."""
    model = write_model_folder(tmp_path)
    write(model / part / "adapter_config.json", json.dumps({"peft_type": "LORA", "target_modules": "(a|a)*b"}))
    assert f"{part}/adapter_config.json would add layers to the weights" in problem_of(model)
    with pytest.raises(FrameBridgeError, match="adapter_config.json would add layers"):
        load_weights(None, part, ModelSource(str(model)), (str(model), part), "a model")  # no class is asked


@pytest.mark.parametrize(
    "values, is_wrong",
    [
        ({"extra_ids": 300, "model_max_length": 10**30}, False),
        ({"extra_ids": 1_000_000}, True),
        ({"init_inputs": ["</s>", "<unk>", "<pad>", 1_000_000]}, True),
    ],
)
def test_a_tokenizer_of_tokens_without_end(tmp_path, values, is_wrong):
    model = write_model_folder(tmp_path)
    write(model / "tokenizer/tokenizer_config.json", json.dumps(values))
    if not is_wrong:
        assert not list(SavedModel(COGVIDEOX, model).findings())
        return
    assert "asks for 1000000 extra tokens" in problem_of(model)
    with pytest.raises(FrameBridgeError, match="asks for 1000000 extra tokens"):
        load_tokenizer(None, ModelSource(str(model)), "a model")  # no class is asked


def test_all_parts_of_a_model_are_of_one_commit_of_a_download_that_is_announced(tmp_path, capsys):
    repository = tmp_path / "models--owner--tiny"
    for commit in ("1" * 40, "2" * 40):
        write_model_folder(repository / "snapshots" / commit)
    write(repository / "refs/main", "1" * 40)
    model = ModelSource("owner/tiny", {"vae": "owner/tiny"}, {"cache_dir": tmp_path})
    assert model.local("owner/tiny", "transformer", settings_only=True).parent.name == "1" * 40
    write(repository / "refs/main", "2" * 40)
    assert {model.folder(part).parent.name for part in ("transformer", "tokenizer")} == {"1" * 40}
    assert ModelSource("owner/tiny", hub={"cache_dir": tmp_path}).folder("transformer").parent.name == "2" * 40
    announced = "owner/tiny is no folder here: it is taken from the Hugging Face Hub, revision main\n"
    assert capsys.readouterr().err == announced


@pytest.mark.parametrize("name", ["runs/mine", "./mine", "~/mine", "/mine", "mine", "../runs/mine"])
def test_a_path_is_not_asked_for_at_the_hub(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for load in (ModelSource(name).folder, lambda part: load_bridge_transformer(name, subfolder=part)):
        with pytest.raises(FrameBridgeError, match="no such folder: "):
            load("transformer")
