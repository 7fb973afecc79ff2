"""A headless Chromium, spoken to by its own protocol over two pipes: no driver, no package."""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

_SECONDS = 600.0


class Page:
    """One page of a browser.

    Args:
        write, read: descriptors of the pipes; messages are JSON, each with a zero byte behind it.
    """

    def __init__(self, write: int, read: int) -> None:
        self._write, self._read = write, read
        self._number, self._rest = 0, b""
        self._events: list[dict[str, Any]] = []
        self._session: dict[str, str] = {}

    def open(self, address: str) -> None:
        """Go there, and wait for the page."""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        for domain in ("Runtime", "Log", "Page"):
            self.send(f"{domain}.enable")
        self.send("Page.navigate", url=address)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def send(self, method: str, **given: Any) -> Any:
        """The result of a call."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": given, **self._session}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer)
                return answer["result"]
            self._events.append(answer)

    def value(self, script: str) -> Any:
        """What an expression is."""
        found = self.send("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, script: str) -> None:
        """Wait until an expression is true."""
        end = time.monotonic() + _SECONDS
        while not self.value(script):
            assert time.monotonic() < end, script
            time.sleep(0.05)

    def screenshot(self, width: int, height: int) -> str:
        """The page as PNG, in base64."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.send("Emulation.setDeviceMetricsOverride", **size)
        return str(self.send("Page.captureScreenshot", format="png")["data"])

    def faults(self) -> list[str]:
        """Exceptions of scripts, and what the browser refused to load or run, refused requests apart."""
        found = [event for event in self._events if event["method"] == "Runtime.exceptionThrown"]
        found += [event for event in self._events if event["method"] == "Log.entryAdded"]
        texts = [json.dumps(event["params"]) for event in found]
        return [text for text in texts if "status of 400" not in text and "favicon" not in text]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            assert select.select([self._read], [], [], _SECONDS)[0], "the browser says nothing"
            part = os.read(self._read, 1 << 16)
            assert part, "the browser has ended"
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        return dict(json.loads(message))


@contextmanager
def chromium(address: str) -> Iterator[Page]:
    """A page in a browser of its own; without Chromium the test is skipped."""
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.skip(f"none of {', '.join(names)} is installed")
    (theirs_in, ours_out), (ours_in, theirs_out) = os.pipe(), os.pipe()
    with tempfile.TemporaryDirectory() as profile:
        # The protocol wants its pipes at 3 and 4.
        words = [program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        words += [f"--user-data-dir={profile}", "--remote-debugging-pipe", "--no-first-run", "about:blank"]
        shell = f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}'
        process = subprocess.Popen(
            ["bash", "-c", shell, *words],
            pass_fds=(theirs_in, theirs_out),
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        try:
            page = Page(ours_out, ours_in)
            page.open(address)
            yield page
        finally:
            process.kill()
            process.wait()
            os.close(ours_out)
            os.close(ours_in)
            time.sleep(0.5)  # Its children write into the profile to the end.
