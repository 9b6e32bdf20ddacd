"""The result of a run on the Hugging Face Hub: its repository, and the upload. The token is the login's."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from framebridge_plugin.backbones.folders import LORA_INFO_FILE
from framebridge_plugin.backbones.lora_folders import read_lora_info
from framebridge_plugin.errors import FinishedRunError, FrameBridgeError, UsageError, first_line


def make_repository(name: str, *, private: bool) -> str:
    """Makes a repository of models if there is none, so that a run whose result nobody takes ends before it begins.

    Args:
        name: Its id; without an owner it is that of the login.
        private: Whether it has to be one that others do not see.

    Returns:
        Its id, with the owner.

    Raises:
        UsageError: If it is public and should not be.
        FrameBridgeError: If the hub refuses it, or cannot be reached.
    """
    hub = HfApi()
    try:
        repository = hub.create_repo(name, private=private, exist_ok=True).repo_id
        is_public = not hub.model_info(repository).private
    except Exception as error:
        raise FrameBridgeError(f"hub.push_to_hub: no repository {name} to upload to: {_answer(error)}") from error
    if private and is_public:
        raise UsageError(
            f"hub.private: {repository} is there and public; set hub.private=false, or another hub.hub_model_id"
        )
    return repository


def upload(folder: Path, repository: str) -> None:
    """Uploads a folder, as it is `to_share`.

    Args:
        folder: That of the model, or of the LoRA.
        repository: What `make_repository` gave.

    Raises:
        FinishedRunError: If the hub does not take it, with the hub's answer, the folder, and a command to try again.
    """
    folder = to_share(folder)
    try:
        HfApi().upload_folder(repo_id=repository, folder_path=folder)
    except Exception as error:
        again = shlex.join(["hf", "upload", repository, str(folder)])
        raise FinishedRunError(
            f"hub.push_to_hub: {repository} was not uploaded: {_answer(error)}; the model lies in {folder}; to try "
            f"again: {again}"
        ) from error


def to_share(folder: Path) -> Path:
    """A model's folder as it is; of a LoRA, whose own says where its base model lies here, a copy that does not."""
    if not (folder / LORA_INFO_FILE).is_file():
        return folder
    shared = folder.with_name(f"{folder.name}-to-share")
    shutil.copytree(folder, shared, dirs_exist_ok=True)
    read_lora_info(folder).without_places().write(shared)
    return shared


def _answer(error: Exception) -> str:
    if not isinstance(error, HfHubHTTPError):
        return f"{type(error).__name__}: {first_line(error)}"
    said = " ".join((error.server_message or error.response.reason_phrase).split())
    return f"the hub answers {error.response.status_code}: {said}"
