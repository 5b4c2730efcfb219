"""A headless Chromium that looks at one page, through its DevTools pipe: no driver, no port, no library."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe",
    "--no-first-run", "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
)  # fmt: skip
DEADLINE_S = 60


def find_chromium() -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), None)


@dataclass(frozen=True)
class Look:
    """What one look at a page found: whatever its console said, what it asked for beside itself, and how wide it is."""

    console: list[str]
    requests: list[str]
    page_px: int
    window_px: int
    png: bytes


class Browser:
    """Sends commands and keeps the events that come meanwhile. Messages end with a zero byte. Raises RuntimeError where
    the browser refuses or is gone."""

    def __init__(self, to_browser: Any, from_browser: Any) -> None:
        self._to, self._from, self._number = to_browser, from_browser, 0
        self._session: dict[str, Any] = {}
        self.events: list[dict[str, Any]] = []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = {"sessionId": self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params, **self._session}
        self._to.write(json.dumps(message).encode() + b"\0")
        self._to.flush()
        while (answer := self._next()).get("id") != self._number:
            self.events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return dict(answer["result"])

    def wait_for(self, method: str) -> None:
        while not any(event.get("method") == method for event in self.events):
            self.events.append(self._next())

    def _next(self) -> dict[str, Any]:
        message = bytearray()
        while (byte := self._from.read(1)) != b"\0":
            if not byte:
                raise RuntimeError("the browser is gone")
            message += byte
        return dict(json.loads(message))

    def look(self, url: str, *, width: int, dark: bool, height: int = 900, whole: bool = False) -> Look:
        """Load `url` in a window of that many pixels. `whole`: the picture is of all the page."""
        self.events.clear()
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=True)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])
        self.ask("Page.navigate", url=url)
        self.wait_for("Page.loadEventFired")
        sizes = self.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
        png = base64.b64decode(
            self.ask("Page.captureScreenshot", captureBeyondViewport=whole, **self._clip(whole))["data"]
        )
        return Look(list(self._console()), self._requests(url), sizes[0], sizes[1], png)

    def evaluate(self, code: str) -> Any:
        return self.ask("Runtime.evaluate", expression=code, returnByValue=True)["result"].get("value")

    def _clip(self, whole: bool) -> dict[str, Any]:
        if not whole:
            return {}
        size = self.ask("Page.getLayoutMetrics")["cssContentSize"]
        return {"clip": {**{name: size[name] for name in ("x", "y", "width", "height")}, "scale": 1}}

    def _console(self) -> Iterator[str]:
        for event in self.events:
            if event.get("method") in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
                yield json.dumps(event["params"])[:500]

    def _requests(self, url: str) -> list[str]:
        """Of the page itself none, and none of what it holds in itself."""
        sent = [e["params"]["request"]["url"] for e in self.events if e.get("method") == "Network.requestWillBeSent"]
        return [each for each in sent if each != url and not each.startswith("data:")]


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A browser of its own profile, stopped at the end of the block."""
    chromium = find_chromium()
    assert chromium is not None
    read_there, write_here = os.pipe()
    read_here, write_there = os.pipe()
    # It wants them as descriptors 3 and 4.
    launch = f'exec "$0" "$@" 3<&{read_there} 4>&{write_there}'
    process = subprocess.Popen(
        ["/bin/bash", "-c", launch, chromium, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
        pass_fds=(read_there, write_there), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(read_there)
    os.close(write_there)
    deadline = threading.Timer(DEADLINE_S, process.kill)  # then whoever waits for an answer reads an end
    deadline.start()
    with os.fdopen(write_here, "wb") as to_browser, os.fdopen(read_here, "rb", buffering=1 << 16) as from_browser:
        try:
            yield Browser(to_browser, from_browser)
        finally:
            deadline.cancel()
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def main() -> None:
    """python tests/browser.py PAGE.html PICTURE.png [WIDTH] [dark]: look at a page."""
    page, picture, *rest = sys.argv[1:]
    with tempfile.TemporaryDirectory() as profile, browser(Path(profile)) as one:
        width = int(rest[0]) if rest else 1100
        look = one.look(Path(page).resolve().as_uri(), width=width, dark="dark" in rest, whole=True)
    Path(picture).write_bytes(look.png)
    sys.stdout.write(f"console {look.console}, requests {look.requests}, {look.page_px} of {look.window_px} px\n")


if __name__ == "__main__":
    main()
