"""A page in headless Chromium, spoken to in its own DevTools protocol."""

import base64
import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from websocket import WebSocket, create_connection

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-port=0",
         "--no-first-run", "--remote-allow-origins=*")  # fmt: skip


class Page:
    """One tab. `requests` are the addresses it asked for, `errors` what its console and scripts complained of."""

    def __init__(self, socket: WebSocket):
        self.socket, self.number, self.requests, self.errors = socket, 0, [], []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> dict:
        """The answer to a command; events that come before it are noted."""
        self.number += 1
        self.socket.send(json.dumps({"id": self.number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self.socket.recv())
            if message.get("id") == self.number:
                assert "error" not in message, message
                return message["result"]
            self._note(message["method"], message["params"])

    def _note(self, event: str, about: dict) -> None:
        if event == "Network.requestWillBeSent":
            self.requests.append(about["request"]["url"])
        elif event == "Runtime.exceptionThrown":
            self.errors.append(about["exceptionDetails"])
        elif event == "Log.entryAdded" and about["entry"]["level"] == "error":
            self.errors.append(about["entry"]["text"])
        elif event == "Runtime.consoleAPICalled" and about["type"] in ("error", "assert"):
            self.errors.append(about["args"])

    def run(self, script: str) -> Any:
        """The value of an expression in the page, which may be a promise."""
        found = self.send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, condition: str) -> None:
        """Until an expression is true in the page, a minute at most."""
        for _ in range(600):
            if self.run(f"(() => {{ try {{ return Boolean({condition}); }} catch (error) {{ return false; }} }})()"):
                return
            time.sleep(0.1)
        raise TimeoutError(condition)

    def open(self, file: Path, query: str = "", width: int = 1280, dark: bool = False) -> None:
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 500
        )
        self.send("Emulation.setEmulatedMedia", features=scheme)
        address = file.as_uri() + query
        self.send("Page.navigate", url=address)
        self.wait(f"location.href.startsWith({json.dumps(address)}) && document.readyState === 'complete'")

    def screenshot(self, file: Path) -> None:
        """The whole page as PNG."""
        size = self.send("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": min(size["height"], 6000), "scale": 1}
        shot = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        file.write_bytes(base64.b64decode(shot["data"]))


@contextmanager
def page(profile: Path) -> Iterator[Page]:
    """A tab of a browser of its own, which keeps its settings in the folder `profile` and ends with the block."""
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            port = next(found[1] for line in process.stderr if (found := re.search(r"ws://[\w.]+:(\d+)/", line)))
            tabs = create_connection(f"ws://127.0.0.1:{port}/devtools/page/{_tab(port)}", timeout=120)
            yield Page(tabs)
        finally:
            process.kill()


def _tab(port: str) -> str:
    from urllib.request import urlopen

    with urlopen(f"http://127.0.0.1:{port}/json/list") as answer:
        return next(each["id"] for each in json.load(answer) if each["type"] == "page")
