"""Open a page in a headless Chromium, point at it, and photograph it.

    python -m experiments.browser docs/attention.html --picture docs/figures/viewer.png

The browser is Debian's chromium or Google's Chrome. It is told what to do by its DevTools protocol, whose
messages are JSON through two pipes, each ended by a zero byte: no driver and no package are needed.
"""

import base64
import itertools
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.cli import RunError, UserError, parse, run

NAMES = "chromium", "chromium-browser", "google-chrome", "google-chrome-stable"
FLAGS = (
    "--headless --remote-debugging-pipe --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run "
    "--hide-scrollbars --disable-background-networking --disable-component-update --disable-sync"
).split()
REDIRECT = 'exec 3<&"$1" 4>&"$2"; shift 2; exec "$@"'  # the browser reads from 3 and writes to 4


def find_browser() -> str:
    """The path of a browser, or "" if there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), "")


class Browser:
    """One headless browser with one page: `with Browser() as b: b.open(path); b.js("1 + 1")`."""

    def __enter__(self) -> "Browser":
        self.folder = tempfile.mkdtemp()
        read_here, write_there = os.pipe()
        read_there, write_here = os.pipe()
        self.read_from, self.write_to, self.waiting = read_here, write_here, b""
        command = [find_browser(), *FLAGS, f"--user-data-dir={self.folder}", "about:blank"]
        self.process = subprocess.Popen(
            ["bash", "-c", REDIRECT, "bash", str(read_there), str(write_there), *command],
            pass_fds=(read_there, write_there), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(read_there)
        os.close(write_there)
        self.numbers, self.session, self.events = itertools.count(1), None, []
        try:
            pages = self("Target.getTargets")["targetInfos"]
            (page,) = (t["targetId"] for t in pages if t["type"] == "page")
            self.session = self("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Network"):
                self(f"{domain}.enable")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.read_from)
        os.close(self.write_to)
        shutil.rmtree(self.folder, ignore_errors=True)

    def message(self, seconds: float) -> dict | None:
        """The next message of the browser; None after that many seconds of silence."""
        while b"\0" not in self.waiting:
            if not select.select([self.read_from], [], [], seconds)[0]:
                return None
            if not (more := os.read(self.read_from, 1 << 20)):
                raise RuntimeError("the browser has ended")
            self.waiting += more
        line, _, self.waiting = self.waiting.partition(b"\0")
        return json.loads(line)

    def __call__(self, method: str, **params) -> dict:
        """Call a method of the DevTools protocol, and return its result. Events are kept."""
        number = next(self.numbers)
        call = {"id": number, "method": method, "params": params}
        if self.session:
            call["sessionId"] = self.session
        os.write(self.write_to, json.dumps(call).encode() + b"\0")
        while (found := self.message(60)) is not None:
            if found.get("id") == number:
                if "error" in found:
                    raise RuntimeError(f"{method}: {found['error']}")
                return found["result"]
            self.events.append(found)
        raise RuntimeError(f"the browser does not answer {method}")

    def js(self, expression: str) -> Any:
        """The value of an expression in the page."""
        found = self("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"]["exception"].get("description"))
        return found["result"].get("value")

    def open(self, path: Path, width: int = 1200, height: int = 800, dark=False, touch=False) -> None:
        """Open a file in a window of that size, in CSS pixels, and wait until it says that it is ready."""
        size = dict(width=width, height=height, deviceScaleFactor=1, mobile=touch)
        self("Emulation.setDeviceMetricsOverride", **size)
        self("Emulation.setTouchEmulationEnabled", enabled=touch)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self("Emulation.setEmulatedMedia", features=[scheme])
        self("Page.navigate", url=path.resolve().as_uri())
        for _ in range(200):
            if self.js("document.body?.dataset.ready") == "yes":
                return
            time.sleep(0.05)
        raise RuntimeError(f"{path} is not ready after 10 seconds: {self.errors()}")

    def errors(self) -> list[str]:
        """Errors and warnings on the console, exceptions, and requests for anything but files and data."""
        found = []
        for event in self.events:
            method, params = event.get("method"), event.get("params", {})
            if method == "Runtime.exceptionThrown" or (
                method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert")
            ):
                found.append(json.dumps(params))
            elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
                found.append(params["entry"]["text"])
            elif method == "Network.requestWillBeSent":
                if not params["request"]["url"].startswith(("file:", "data:", "about:", "blob:")):
                    found.append(f"request: {params['request']['url']}")
        return found

    def centre(self, selector: str) -> tuple[float, float]:
        """Where the middle of an element is, after scrolling to it."""
        found = f"const box = document.querySelector({json.dumps(selector)})"
        rect = "const r = (box.getClientRects()[0])"
        return tuple(
            self.js(
                f"(() => {{ {found}; box.scrollIntoView({{block: 'nearest'}}); {rect}; "
                "return [r.x + r.width / 2, r.y + r.height / 2]; })()"
            )
        )

    def mouse(self, kind: str, x: float, y: float, **more) -> None:
        self("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)

    def hover(self, selector: str) -> None:
        self.mouse("mouseMoved", *self.centre(selector))

    def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """Press the mouse's left button at one place, and let it go at another."""
        self.mouse("mousePressed", *start, button="left", buttons=1, clickCount=1)
        self.mouse("mouseMoved", *end, button="left", buttons=1)
        self.mouse("mouseReleased", *end, button="left", clickCount=1)

    def tap(self, selector: str) -> None:
        x, y = self.centre(selector)
        self("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        self("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def key(self, name: str, shift: bool = False) -> None:
        codes = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Tab": 9}
        for kind in ("rawKeyDown", "keyUp"):
            self("Input.dispatchKeyEvent", type=kind, key=name, code=name,
                 windowsVirtualKeyCode=codes[name], modifiers=8 * shift)  # fmt: skip

    def photograph(self, path: Path) -> None:
        """The window as a PNG."""
        path.write_bytes(base64.b64decode(self("Page.captureScreenshot")["data"]))


@dataclass
class PhotographConfig:
    page: str = "docs/attention.html"  # the page, an HTML file
    picture: str = "docs/figures/viewer.png"  # the PNG that is written
    width: int = 1000  # of the window, in CSS pixels
    height: int = 640  # of the window, in CSS pixels
    dark: bool = False  # for readers who prefer dark colours
    point: str = ""  # what the mouse points at: a CSS selector, such as [data-token="40"]

    def check(self) -> None:
        if not Path(self.page).is_file():
            raise UserError(f"there is no page {self.page}: experiments.attention_maps --html makes one")
        if not find_browser():
            raise UserError(f"there is no browser ({', '.join(NAMES)}): apt install chromium")


def main() -> None:
    config, _ = parse(PhotographConfig(), sys.argv[1:], __doc__, "page")
    config.check()
    try:
        with Browser() as browser:
            browser.open(Path(config.page), config.width, config.height, config.dark)
            if config.point:
                browser.hover(config.point)
            browser.photograph(Path(config.picture))
    except (RuntimeError, BrokenPipeError) as e:
        raise RunError(f"cannot photograph {config.page}: {e}") from e
    print(f"written: {config.picture}, {Path(config.picture).stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    run(main)
