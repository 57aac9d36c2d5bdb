"""A headless Chromium for tests, spoken to in its DevTools protocol over two pipes. Standard library only."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# Nothing that a page of ours does takes so long, also on a busy machine.
GUARD_S = 120.0
FLAGS = (
    *(
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--remote-debugging-pipe",
        "--no-first-run",
        "--hide-scrollbars",
    ),
    *("--disable-dev-shm-usage", "--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-extensions", "--no-default-browser-check", "--force-color-profile=srgb", "--mute-audio"),
)
# Becomes the browser, with the two pipes where it looks for them.
PLUMBER = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execv(sys.argv[3], sys.argv[3:])"
)


def find() -> str | None:
    """The browser's program, or None."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


@dataclass
class Page:
    """What happened while a page was open: messages of the console, exceptions, violations of its policy, requests."""

    browser: Browser
    session: str
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def open(self, path: Path, width: int, *, dark: bool = False, height: int = 900) -> None:
        """Load a file in a window of this width; forgets what happened before."""
        self.complaints.clear()
        self.requests.clear()
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media="screen", features=[scheme])
        self.browser.loaded.discard(self.session)
        self.call("Page.navigate", url=path.resolve().as_uri())
        self.browser.wait_for(lambda: self.session in self.browser.loaded)
        # What is decoded late would complain late.
        self.evaluate("Promise.all([...document.images].map(i => i.decode().catch(() => 0))).then(() => true)")

    def evaluate(self, script: str) -> Any:
        """The value of an expression, awaited if it is a promise."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(json.dumps(found["exceptionDetails"])[:1000])
        return found["result"].get("value")

    def screenshot(self, path: Path) -> None:
        """The whole page as a PNG."""
        size = self.evaluate("[innerWidth, document.documentElement.scrollHeight]")
        clip = {"x": 0, "y": 0, "width": size[0], "height": size[1], "scale": 1}
        found = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(found["data"]))

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self.browser.call(method, self.session, **parameters)


class Browser:
    """The process and its two pipes. Everything that it writes lies in ``folder``."""

    def __init__(self, program: str, folder: Path) -> None:
        inwards, self.inlet = os.pipe()
        self.outlet, outwards = os.pipe()
        # Beyond 3 and 4, where the browser wants them, so that none is overwritten before it is moved.
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (inwards, outwards)]
        os.close(inwards)
        os.close(outwards)
        (folder / "tmp").mkdir(parents=True)
        environment = {**os.environ, "HOME": str(folder), "TMPDIR": str(folder / "tmp"), "XDG_RUNTIME_DIR": str(folder)}
        command = [program, *FLAGS, f"--user-data-dir={folder / 'profile'}", "about:blank"]
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-c", PLUMBER, *map(str, ends), *command],
            pass_fds=ends,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        for end in ends:
            os.close(end)
        self.number, self.buffer = 0, b""
        self.answers: dict[int, dict[str, Any]] = {}
        self.pages: dict[str, Page] = {}
        self.loaded: set[str] = set()

    def page(self) -> Page:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = self.pages[session] = Page(self, session)
        for domain in ("Page", "Runtime", "Log", "Network", "Audits"):
            page.call(f"{domain}.enable")
        return page

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        self.number += 1
        number = self.number
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        content = json.dumps(message).encode() + b"\0"
        while content:
            content = content[os.write(self.inlet, content) :]
        self.wait_for(lambda: number in self.answers)
        answer = self.answers.pop(number)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        found: dict[str, Any] = answer["result"]
        return found

    def wait_for(self, done: Any) -> None:
        """Take in what the browser says until ``done()``."""
        end = time.monotonic() + GUARD_S
        while not done():
            ready, _, _ = select.select([self.outlet], [], [], max(0.0, end - time.monotonic()))
            content = os.read(self.outlet, 1 << 20) if ready else b""
            if not content:
                raise RuntimeError("the browser has ended" if ready else f"the browser was silent for {GUARD_S:g} s")
            *messages, self.buffer = (self.buffer + content).split(b"\0")
            for message in messages:
                self._take(json.loads(message))

    def _take(self, message: dict[str, Any]) -> None:
        if "id" in message:
            self.answers[message["id"]] = message
            return
        page, facts = self.pages.get(message.get("sessionId", "")), message.get("params", {})
        if page is None:
            return
        match message["method"]:
            case "Page.loadEventFired":
                self.loaded.add(page.session)
            case "Network.requestWillBeSent":
                page.requests.append(facts["request"]["url"])
            case "Runtime.consoleAPICalled" | "Runtime.exceptionThrown" | "Log.entryAdded" | "Audits.issueAdded":
                page.complaints.append(json.dumps(facts)[:1000])

    def close(self) -> None:
        with contextlib.suppress(OSError, RuntimeError):
            self.call("Browser.close")
        with contextlib.suppress(OSError):
            os.close(self.inlet)
            os.close(self.outlet)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        # Its children too; they are a session of their own.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(GUARD_S)


@contextlib.contextmanager
def chromium(folder: Path) -> Iterator[Browser]:
    """A browser that is gone at the end, with all that it wrote.

    folder: a new one for what it writes.
    """
    program = find()
    if program is None:
        raise FileNotFoundError("no Chromium")
    browser = Browser(program, folder)
    try:
        yield browser
    finally:
        browser.close()
        shutil.rmtree(folder, ignore_errors=True)
