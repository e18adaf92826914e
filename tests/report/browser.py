"""A headless Chromium, driven over a pipe in the DevTools protocol with the standard library alone."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find_chromium() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page. ``complaints`` are errors and warnings of its console, uncaught exceptions, what its policy refused;
    ``requests`` is what it fetched."""

    def __init__(self, program: str, profile: Path) -> None:
        ours_in, low_out = os.pipe()
        low_in, ours_out = os.pipe()
        theirs_in, theirs_out = (fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (low_in, low_out))
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-extensions"]
        flags += ["--disable-background-networking", f"--user-data-dir={profile}", "--remote-debugging-pipe"]
        command = [program, *flags, "about:blank"]

        # Chromium looks for the pipe at 3 and 4, where this process may hold something else: a shell puts it there.
        moved = f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}'
        self._process = subprocess.Popen(
            ["bash", "-c", moved, "bash", *command], pass_fds=(theirs_in, theirs_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for fd in (low_in, low_out, theirs_in, theirs_out):
            os.close(fd)
        self._read, self._write, self._buffer, self._last = ours_in, ours_out, b"", 0
        self.complaints: list[str] = []
        self.requests: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command of the protocol, and its answer; events that come meanwhile are kept."""
        self._last += 1
        message: dict[str, Any] = {"id": self._last, "method": method, "params": parameters}
        if not method.startswith("Target."):
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._last:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self._note(answer)

    def open(self, path: Path, *, width: int = 1200, height: int = 900, dark: bool = False) -> None:
        """Load a file at a window size and colour scheme, and wait for its script."""
        self.complaints, self.requests = [], []
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        self.call("Page.navigate", url=path.resolve().as_uri())
        # Not every page under test has animations; those that do draw them once their picture is decoded.
        there = f"location.href === {json.dumps(path.resolve().as_uri())} && document.documentElement?.dataset.ready === 'true'"
        self.wait_for(there)
        self.wait_for("[...document.querySelectorAll('.animation')].every(a => a.dataset.drawn === 'true')")

    def evaluate(self, expression: str) -> Any:
        out = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in out, out["exceptionDetails"]
        return out["result"].get("value")

    def wait_for(self, condition: str, seconds: float = 60.0) -> None:
        end = time.monotonic() + seconds
        while not self.evaluate(condition):
            assert time.monotonic() < end, f"still not so after {seconds} s: {condition}; the page complained of {self.complaints}"
            time.sleep(0.05)

    def press(self, key: str) -> None:
        """A key of the keyboard, by its name in the DOM: "Tab", "Enter", "ArrowLeft"."""
        code = {"Tab": 9, "Enter": 13, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, " ": 32}[key]
        held = {"key": key, "code": "Space" if key == " " else key, "windowsVirtualKeyCode": code}
        text = {"Enter": "\r", " ": " "}.get(key)
        self.call("Input.dispatchKeyEvent", type="keyDown", **held, **({} if text is None else {"text": text}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **held)

    def picture(self, path: Path, element: str | None = None) -> None:
        """A PNG of the whole page, or of the element that an expression gives."""
        box = f"({element}).getBoundingClientRect()" if element else "new DOMRect(0, 0, innerWidth, document.body.scrollHeight)"
        given = self.evaluate(f"(b => [b.x + scrollX, b.y + scrollY, b.width, b.height])({box})")
        clip = dict(zip(("x", "y", "width", "height"), given, strict=True)) | {"scale": 1}
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)["data"]
        path.write_bytes(base64.b64decode(data))

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._read)
        os.close(self._write)

    def _next(self, seconds: float = 120.0) -> dict[str, Any]:
        end = time.monotonic() + seconds
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0.0, end - time.monotonic()))
            piece = os.read(self._read, 1 << 20) if ready else b""
            if not piece:
                raise RuntimeError(f"Chromium said nothing for {seconds} s" if not ready else f"Chromium ended: {self._process.poll()}")
            self._buffer += piece
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        name, about = event.get("method"), event.get("params", {})
        if name == "Runtime.consoleAPICalled" and about["type"] in ("error", "warning", "assert"):
            self.complaints.append(f"console: {about['args']}")
        elif name == "Runtime.exceptionThrown":
            self.complaints.append(f"exception: {about['exceptionDetails']}")
        elif name == "Log.entryAdded" and about["entry"]["level"] in ("error", "warning"):
            self.complaints.append(f"log: {about['entry']['text']}")
        elif name == "Network.requestWillBeSent":
            self.requests.append(about["request"]["url"])
