"""Chromium, headless, driven over a pipe by the DevTools protocol: what a page does when it is opened."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser")
_PATIENCE_S = 60.0


@dataclass
class View:
    """A page as it was opened.

    Attributes:
        width: of the window, by its own account.
        content: width of the document.
        loaded: whether all pictures have been decoded.
        png: the first screen.
        messages: on the console, errors among them.
        requests: addresses that were asked for, but the page's and those of its own data.
    """

    width: int = 0
    content: int = 0
    loaded: bool = False
    png: bytes = b""
    messages: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


class Chromium:
    """A browser with one tab; use it in ``with``.

    Args:
        profile: an empty folder for what it writes.
    """

    def __init__(self, profile: Path) -> None:
        assert PROGRAM is not None
        self._profile = profile
        self._buffer = b""
        self._last = 0
        self._events: list[dict[str, Any]] = []
        self._session: str | None = None

    def __enter__(self) -> Chromium:
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 16) for fd in (theirs_in, theirs_out)]  # clear of 3 and 4
        log = str(self._profile / "log")
        command = [
            str(PROGRAM), "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--no-first-run", "--disable-background-networking", "--disable-component-update",
            "--hide-scrollbars", "--remote-debugging-pipe", f"--user-data-dir={self._profile}", "about:blank",
        ]  # fmt: skip
        self._pid = os.posix_spawn(
            command[0], command, os.environ | {"HOME": str(self._profile)}, setsid=True,
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 1, log, os.O_WRONLY | os.O_CREAT, 0o600), (os.POSIX_SPAWN_DUP2, 1, 2),
                (os.POSIX_SPAWN_DUP2, high[0], 3), (os.POSIX_SPAWN_DUP2, high[1], 4),
            ],
        )  # fmt: skip
        for fd in (theirs_in, theirs_out, *high):
            os.close(fd)
        targets = self._call("Target.getTargets")["targetInfos"]
        tab = next(t["targetId"] for t in targets if t["type"] == "page")
        self._session = self._call("Target.attachToTarget", targetId=tab, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self._call(f"{domain}.enable")
        return self

    def __exit__(self, *_: object) -> None:
        os.killpg(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        os.close(self._in)
        os.close(self._out)

    def open(self, page: Path, width: int, height: int, scheme: str, *, whole: bool = False) -> View:
        """Open a file in a window of that many CSS pixels and that colour scheme.

        Args:
            page: an HTML file.
            width: of the window.
            height: of the window.
            scheme: ``"light"`` or ``"dark"``.
            whole: make the picture as high as the page.
        """
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self._call("Emulation.setEmulatedMedia", media="screen", features=features)
        self._events.clear()
        self._call("Page.navigate", url=page.as_uri())
        self._wait("Page.loadEventFired")
        view = View()
        view.loaded = self._evaluate(
            "Promise.all([...document.images].map(i => i.decode().then(() => i.naturalWidth > 0, () => false)))"
            ".then(all => all.every(Boolean))"
        )
        view.width = self._evaluate("window.innerWidth")
        view.content = self._evaluate("document.documentElement.scrollWidth")
        shot = self._call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        view.png = base64.b64decode(shot["data"])
        for event in self._events:
            method, found = event["method"], event["params"]
            if method == "Network.requestWillBeSent" and found["request"]["url"] != page.as_uri():
                view.requests.append(found["request"]["url"])
            elif method in ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown"):
                view.messages.append(json.dumps(found))
        view.requests = [url for url in view.requests if not url.startswith("data:")]
        return view

    def _evaluate(self, expression: str) -> Any:
        found = self._call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in found:
            raise RuntimeError(json.dumps(found["exceptionDetails"]))
        return found["result"]["value"]

    def _call(self, method: str, **params: Any) -> Mapping[str, Any]:
        self._last += 1
        message: dict[str, Any] = {"id": self._last, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._out, data) :]
        while (answer := self._read()).get("id") != self._last:
            self._events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        result: Mapping[str, Any] = answer["result"]
        return result

    def _wait(self, method: str) -> None:
        while not any(event.get("method") == method for event in self._events):
            self._events.append(self._read())

    def _read(self) -> dict[str, Any]:
        end = time.monotonic() + _PATIENCE_S
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._in], [], [], max(0.0, end - time.monotonic()))
            data = os.read(self._in, 1 << 20) if ready else b""
            if not data:
                log = (self._profile / "log").read_text(errors="replace")[-2000:]
                raise RuntimeError(f"Chromium does not answer; its log ends with: {log}")
            self._buffer += data
        one, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(one)
        return message
