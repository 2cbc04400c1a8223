"""Headless Chromium or Chrome, driven by its DevTools protocol over a pipe, without further packages."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

COMMANDS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
TIMEOUT_SECONDS = 60
# Puts two descriptors of any numbers in the place of 3 and 4, and becomes the browser
LAUNCHER = """
import fcntl, os, sys
requests, answers = (fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3])
os.dup2(requests, 3)
os.dup2(answers, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


def find_browser() -> str | None:
    """Return the browser of the variable KNOWISO_BROWSER, or the first that is installed. None: there is none."""
    if sys.platform == "win32":  # descriptors 3 and 4 are those of POSIX
        return None
    named = os.environ.get("KNOWISO_BROWSER")
    if named:
        return shutil.which(named)
    return next((path for command in COMMANDS if (path := shutil.which(command))), None)


class Browser:
    """A page in a headless browser; `problems` collects console errors, exceptions and requests of the network."""

    def __init__(self, command: str, profile: str) -> None:
        # The browser reads requests from file descriptor 3 and writes answers to 4
        self._requests, requests = os.pipe()
        answers, self._answers = os.pipe()
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run"]
        options += ["--disable-background-networking", "--hide-scrollbars", f"--user-data-dir={profile}", "about:blank"]
        descriptors = (str(self._requests), str(self._answers))
        self._process = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, *descriptors, command, *options],
            pass_fds=(self._requests, self._answers),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(self._requests)
        os.close(self._answers)
        self._out, self._in = requests, os.fdopen(answers, "rb")
        self._count, self._buffer = 0, b""
        self.problems: list[str] = []
        target = self.call("Target.createTarget", url="about:blank", session=False)["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True, session=False)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, *, session: bool = True, **parameters: Any) -> dict[str, Any]:
        """Run a method of the DevTools protocol and return its result."""
        self._count += 1
        message: dict[str, Any] = {"id": self._count, "method": method, "params": parameters}
        if session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self._count:
            self._note(answer)
        assert "error" not in answer, f"{method}: {answer}"
        return answer["result"]  # type: ignore[no-any-return]

    def open(self, path: Path) -> None:
        """Open a file and wait until it is loaded."""
        self.call("Page.navigate", url=path.resolve().as_uri())
        while (answer := self._read()).get("method") != "Page.loadEventFired":
            self._note(answer)

    def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression, awaited if it is a promise."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def click(self, selector: str) -> None:
        """Press the left mouse button in the middle of an element."""
        x, y = self.evaluate(
            f"(e => {{ e.scrollIntoView({{block: 'center', behavior: 'instant'}}); const b = e.getBoundingClientRect();"
            f" return [b.x + b.width / 2, b.y + b.height / 2]; }})(document.querySelector({json.dumps(selector)}))"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def show(self, *, theme: str = "light", width: int = 1200, height: int = 900, media: str = "screen") -> None:
        """Set the theme of the system, the size of the window, and the medium."""
        features = [{"name": "prefers-color-scheme", "value": theme}]
        self.call("Emulation.setEmulatedMedia", media=media, features=features)
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def screenshot(self, path: Path) -> None:
        """Write a PNG of the whole page."""
        data = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))

    def close(self) -> None:
        """End the browser."""
        os.close(self._out)
        self._in.close()
        self._process.terminate()
        self._process.wait(TIMEOUT_SECONDS)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            data = os.read(self._in.fileno(), 2**16)
            assert data, "the browser ended"
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(line)  # type: ignore[no-any-return]

    def _note(self, event: dict[str, Any]) -> None:
        values = event.get("params", {})
        match event.get("method"):
            case "Runtime.exceptionThrown":
                self.problems.append(str(values["exceptionDetails"]))
            case "Runtime.consoleAPICalled" if values["type"] in ("error", "warning", "assert"):
                self.problems.append(str(values["args"]))
            case "Log.entryAdded" if values["entry"]["level"] in ("error", "warning"):
                self.problems.append(values["entry"]["text"])
            case "Network.requestWillBeSent" if not values["request"]["url"].startswith(("file:", "data:", "about:")):
                self.problems.append(f"request of {values['request']['url']}")


@contextmanager
def headless_browser(command: str) -> Iterator[Browser]:
    """Yield a browser with an empty profile, and end it."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = Browser(command, profile)
        try:
            yield browser
        finally:
            browser.close()
