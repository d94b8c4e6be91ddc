"""Headless Chromium, told what to do over its debugging pipe (the Chrome DevTools protocol)."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = next(
    (
        found
        for name in ("chromium", "chromium-browser", "google-chrome", "chrome")
        if (found := shutil.which(name))
    ),
    None,
)
# Chromium reads commands on file 3 and answers on file 4.
_LAUNCH = """import os, sys
os.dup2(int(sys.argv[1]), 3)
os.dup2(int(sys.argv[2]), 4)
os.execv(sys.argv[3], sys.argv[3:])"""
_PATIENCE = 60.0
"""Seconds."""


class Tab:
    """The browser's one page."""

    def __init__(self, commands: int, answers: int) -> None:
        """Files that commands are written to and answers are read from."""
        self._commands, self._answers = commands, answers
        self._read = b""
        self._number = 0
        self._session: str | None = None
        self.events: list[tuple[str, Mapping[str, Any]]] = []
        """What happened in the page: name and parameters."""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "DOM"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> Any:
        """The result of one command.

        Raises:
            RuntimeError: Chromium refuses it.
        """
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            said = self._next()
            if said.get("id") == self._number:
                if "error" in said:
                    raise RuntimeError(f"{method}: {said['error']['message']}")
                return said["result"]

    def _next(self) -> Mapping[str, Any]:
        while b"\0" not in self._read:
            if not select.select([self._answers], [], [], _PATIENCE)[0]:
                raise TimeoutError("Chromium says nothing")
            got = os.read(self._answers, 1 << 20)
            if not got:
                raise RuntimeError("Chromium has ended")
            self._read += got
        one, self._read = self._read.split(b"\0", 1)
        said: Mapping[str, Any] = json.loads(one)
        if "method" in said:
            self.events.append((said["method"], said["params"]))
        return said

    def open(self, url: str, width: int, height: int = 900, dark: bool = False) -> None:
        """Load a page in a window of this size; `events` are its own from here on."""
        self.resize(width, height)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.events.clear()
        self.send("Page.navigate", url=url)
        while not any(name == "Page.loadEventFired" for name, _ in self.events):
            self._next()

    def resize(self, width: int, height: int) -> None:
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def run(self, script: str) -> Any:
        """The value of an expression; a promise's, when it is there.

        Raises:
            RuntimeError: it throws.
        """
        found = self.send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in found:
            raise RuntimeError(
                f"{script}: {found['exceptionDetails'].get('exception', {}).get('description')}"
            )
        return found["result"].get("value")

    def wait(self, condition: str, seconds: float = _PATIENCE) -> None:
        """Until an expression is true.

        Raises:
            TimeoutError: it does not become so.
        """
        end = time.monotonic() + seconds
        while not self.run(f"Boolean({condition})"):
            if time.monotonic() > end:
                raise TimeoutError(
                    f"{condition} is not true after {seconds:.0f} s: {self.run('document.body.innerText')}"
                )
            time.sleep(0.05)

    def type(self, text: str) -> None:
        """Into what has the focus."""
        self.send("Input.insertText", text=text)

    def press(self, key: str, modifiers: int = 0) -> None:
        """A key by its name ("Enter", "Tab", "ArrowDown"); `modifiers` 8 = with Shift."""
        codes = {"Enter": 13, "Tab": 9, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}
        common = {"key": key, "code": key, "modifiers": modifiers, "windowsVirtualKeyCode": codes[key]}
        text = {"text": "\r"} if key == "Enter" else {}
        self.send("Input.dispatchKeyEvent", type="keyDown", **common, **text)
        self.send("Input.dispatchKeyEvent", type="keyUp", **common)

    def give_files(self, selector: str, *files: Path) -> None:
        """Choose files in an `<input type="file">`."""
        root = self.send("DOM.getDocument")["root"]["nodeId"]
        node = self.send("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.send("DOM.setFileInputFiles", nodeId=node, files=[str(file) for file in files])

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"]))

    def complaints(self) -> list[str]:
        """What the page's console has of warnings and errors."""
        self.run("0")  # events that are on their way
        said = []
        for name, event in self.events:
            if name == "Runtime.exceptionThrown":
                said.append(str(event["exceptionDetails"]))
            elif name == "Runtime.consoleAPICalled" and event["type"] in ("error", "warning", "assert"):
                said.append(str(event["args"]))
            elif name == "Log.entryAdded" and event["entry"]["level"] in ("error", "warning"):
                said.append(f"{event['entry']['text']} {event['entry'].get('url', '')}")
        return said

    def requests(self) -> list[str]:
        """Addresses that the page has asked for, without those of data."""
        urls = [event["request"]["url"] for name, event in self.events if name == "Network.requestWillBeSent"]
        return [url for url in urls if not url.startswith("data:")]


def _pipe() -> tuple[int, int]:
    """Ends to read and to write, with numbers above those that Chromium wants."""
    low = os.pipe()
    read, write = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in low)
    for end in low:
        os.close(end)
    return read, write


@contextmanager
def browser(profile: Path) -> Iterator[Tab]:
    """A Chromium of its own, with its settings in `profile`, until the block ends."""
    theirs_to_read, commands = _pipe()
    answers, theirs_to_write = _pipe()
    theirs = (theirs_to_read, theirs_to_write)
    command = [
        *(sys.executable, "-c", _LAUNCH, *map(str, theirs)),
        str(CHROMIUM),
        "--headless",
        "--remote-debugging-pipe",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--disable-background-networking",
        f"--user-data-dir={profile}",
    ]
    process = subprocess.Popen(command, pass_fds=theirs, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    for end in theirs:
        os.close(end)
    try:
        yield Tab(commands, answers)
    finally:
        process.terminate()
        process.wait(_PATIENCE)
        os.close(commands)
        os.close(answers)
