"""Files that may be a stranger's are opened only where they come to an end, and downloaded only whole."""

from __future__ import annotations

import functools
import http.server
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from framebridge_plugin import files
from framebridge_plugin.errors import FrameBridgeError, UsageError
from framebridge_plugin.files import leads_out, local_copy, open_regular
from framebridge_plugin.media import read_image


@pytest.fixture
def address(tmp_path) -> Iterator[str]:
    """Where a server gives what is in `tmp_path`."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_only_a_regular_file_opens(tmp_path):
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to("file")
    for name in ("file", "link"):
        with open_regular(tmp_path / name) as file:
            assert file.read() == b"content"
    os.mkfifo(tmp_path / "pipe")
    for path, error in ((tmp_path / "pipe", OSError), (Path("/dev/zero"), OSError), (tmp_path, IsADirectoryError)):
        before = os.listdir("/proc/self/fd")
        with pytest.raises(error, match=str(path)):
            open_regular(path)
        assert os.listdir("/proc/self/fd") == before
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "nowhere")


def test_what_leads_out_of_a_folder(tmp_path):
    home = tmp_path / "datasets--a--b" / "snapshots" / "0123" / "data"
    home.mkdir(parents=True)
    blobs = tmp_path / "datasets--a--b" / "blobs"
    blobs.mkdir()
    (blobs / "1").touch()
    (tmp_path / "secret").touch()
    (home / "own").touch()
    targets = {"inside": home / "own", "blob": blobs / "1", "secret": tmp_path / "secret", "nowhere": "gone"}
    for name, target in targets.items():
        (home / name).symlink_to(target)
    (tmp_path / "named").symlink_to(home)
    for folder in (home, tmp_path / "named"):
        found = [
            name
            for name in ("own", *targets, "../../0123/data/own", "../../../../secret")
            if leads_out(folder / name, folder)
        ]
        assert found == ["secret", "../../../../secret"]


def test_a_picture_of_the_web(tmp_path, address, monkeypatch):
    Image.new("RGB", (6, 4), (0, 0, 255)).save(tmp_path / "a.png")
    Image.new("RGB", (6, 4)).save(tmp_path / "a.eps")
    with local_copy(f"{address}/a.png") as path:
        assert read_image(path).getpixel((0, 0)) == (0, 0, 255)
    assert not path.exists()
    with pytest.raises(UsageError, match=f"^{address}/a.eps: is no picture"), local_copy(f"{address}/a.eps") as path:
        read_image(path)
    with pytest.raises(FrameBridgeError, match=r"/none\.png cannot be downloaded: HTTP Error 404"):
        local_copy(f"{address}/none.png").__enter__()
    monkeypatch.setattr(files, "MAX_DOWNLOAD_BYTES", 10)
    with pytest.raises(FrameBridgeError, match=r"/a\.png cannot be downloaded: it is larger than"):
        local_copy(f"{address}/a.png").__enter__()
    with local_copy(str(tmp_path / "a.png")) as path:
        assert path == tmp_path / "a.png"
