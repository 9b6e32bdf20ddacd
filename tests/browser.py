"""Chromium without a window, through chromedriver's W3C interface: what it loads, what it says, what it runs."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHROMIUM, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
MISSING = "needs Debian's packages chromium and chromium-driver: apt-get install chromium chromium-driver"

_FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync")
_FLAGS += ("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage")


class Browser:
    """A session of the browser."""

    def __init__(self, session: str) -> None:
        self._session = session

    def call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        return _call(f"{self._session}/{path}", body)

    def open(self, page: Path, width: int = 1200, height: int = 900, **media: str) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.devtools("Emulation.setDeviceMetricsOverride", size)
        features = [{"name": name.replace("_", "-"), "value": value} for name, value in media.items()]
        self.devtools("Emulation.setEmulatedMedia", {"features": features})
        self.call("url", {"url": page.as_uri()})

    def devtools(self, command: str, parameters: dict[str, Any]) -> Any:
        return self.call("goog/cdp/execute", {"cmd": command, "params": parameters})

    def run(self, script: str) -> Any:
        return self.call("execute/sync", {"script": script, "args": []})

    def wait_for(self, script: str) -> Any:
        """What the script returns once that is true."""
        end = time.monotonic() + 30
        while not (value := self.run(script)):
            assert time.monotonic() < end, script
            time.sleep(0.05)
        return value

    def messages(self) -> list[str]:
        """What pages said since the last call: errors of scripts, and what their policy forbade."""
        return [entry["message"] for entry in self.call("se/log", {"type": "browser"})]

    def requested(self) -> list[str]:
        """All addresses that files asked for since the last call; the browser's own first page is none."""
        events = [json.loads(entry["message"])["message"] for entry in self.call("se/log", {"type": "performance"})]
        sent = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
        return [request["request"]["url"] for request in sent if request["documentURL"].startswith("file:")]

    def screenshot(self) -> bytes:
        shot = self.devtools("Page.captureScreenshot", {"captureBeyondViewport": True})
        return base64.b64decode(shot["data"])


def _call(address: str, body: dict[str, Any] | None = None, method: str | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"}, method=method)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["value"]


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A browser with a new profile, and no other network than this machine's."""
    with subprocess.Popen([str(DRIVER), "--port=0"], stdout=subprocess.PIPE, text=True) as driver:
        try:
            assert driver.stdout is not None
            line = next(line for line in driver.stdout if "successfully on port" in line)
            server = f"http://127.0.0.1:{line.rpartition(' ')[2].strip().rstrip('.')}/session"
            options = {"binary": CHROMIUM, "args": [*_FLAGS, f"--user-data-dir={profile}"]}
            options |= {"perfLoggingPrefs": {"enableNetwork": True}}
            wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}}
            session = _call(server, {"capabilities": {"alwaysMatch": wanted}})["sessionId"]
            try:
                yield Browser(f"{server}/{session}")
            finally:
                _call(f"{server}/{session}", method="DELETE")
        finally:
            driver.terminate()
