"""Which files belong to a component, and that nothing in a stranger's model leads elsewhere."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from framebridge_plugin.backbones.files import component_files
from framebridge_plugin.backbones.fingerprint import component_fingerprint
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
    strays = ["id_rsa", ".env", ".config.json", "modeling.py", "notes.txt", "credentials.json", "old/config.json"]
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
