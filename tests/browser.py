"""Headless Chromium, driven over its own pipe: no driver, no other package."""

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "headless_shell")


def chromium() -> str | None:
    """Return where a Chromium is; `INFLUENCE_CHROMIUM` names another."""
    named = os.environ.get("INFLUENCE_CHROMIUM")
    return named or next((found for name in NAMES if (found := shutil.which(name))), None)


class Browser:
    """A page in a browser of its own, which ends with the block."""

    def __init__(self, executable: str, profile: Path, width: int = 1280, height: int = 900) -> None:
        there, back = os.pipe(), os.pipe()
        flags = ["--headless=new", "--remote-debugging-pipe", "--no-first-run", "--disable-gpu", "--no-sandbox"]
        flags += ["--disable-dev-shm-usage", "--disable-background-networking", f"--window-size={width},{height}"]
        flags += [f"--user-data-dir={profile}", "about:blank"]

        def to_three_and_four() -> None:
            ends = os.dup(there[0]), os.dup(back[1])  # neither of them is 3 or 4 when it is moved there
            held = [os.dup2(end, 10 + n) for n, end in enumerate(ends)]
            for n, end in enumerate(held):
                os.dup2(end, 3 + n, inheritable=True)

        self.process = subprocess.Popen(
            [executable, *flags],
            preexec_fn=to_three_and_four,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(there[0])
        os.close(back[1])
        self.out, self.into, self.rest, self.number = there[1], back[0], b"", 0
        self.session: str | None = None
        self.events: list[dict[str, Any]] = []
        target = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(20)
        os.close(self.out)
        os.close(self.into)

    def call(self, method: str, **parameters: Any) -> Any:
        """Call a method of the DevTools protocol and return its result."""
        self.number += 1
        message: dict[str, Any] = {"id": self.number, "method": method, "params": parameters}
        os.write(self.out, json.dumps(message | ({"sessionId": self.session} if self.session else {})).encode() + b"\0")
        while True:
            found = self._read(60)
            if found.get("id") == self.number:
                if "error" in found:
                    raise RuntimeError(f"{method}: {found['error']}")
                return found["result"]
            self.events.append(found)

    def _read(self, seconds: float) -> dict[str, Any]:
        while b"\0" not in self.rest:
            if not select.select([self.into], [], [], seconds)[0]:
                raise TimeoutError("the browser does not answer")
            self.rest += os.read(self.into, 1 << 20)
        one, _, self.rest = self.rest.partition(b"\0")
        return json.loads(one)

    def open(self, address: str, ready: str = "document.documentElement?.dataset.ready === 'yes'") -> float:
        """Open a page, wait until it is ready, and return the seconds that took."""
        begin = time.perf_counter()
        self.call("Page.navigate", url=address)
        self.until(ready)
        return time.perf_counter() - begin

    def processor(self) -> float:
        """Return the processor seconds that the page's process has used so far, all of its threads together."""
        self.call("Performance.enable")
        return next(
            one["value"] for one in self.call("Performance.getMetrics")["metrics"] if one["name"] == "ProcessTime"
        )

    def js(self, expression: str) -> Any:
        """Return the value of an expression of JavaScript."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"].get("exception", {}).get("description", str(found)))
        return found["result"].get("value")

    def until(self, expression: str, seconds: float = 30) -> None:
        """Wait until an expression is true."""
        end = time.monotonic() + seconds
        while not self.js(expression):
            if time.monotonic() > end:
                raise TimeoutError(f"never true: {expression}")
            time.sleep(0.02)

    def type(self, text: str) -> None:
        """Type a text where the focus is."""
        for letter in text:
            self.call("Input.dispatchKeyEvent", type="char", text=letter)

    def press(self, key: str) -> None:
        """Press a key where the focus is."""
        codes = {"Enter": 13, "ArrowDown": 40, "ArrowUp": 38, "/": 191, "Tab": 9}
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=codes[key])

    def click(self, selector: str) -> None:
        """Click the middle of an element, as a mouse does."""
        place = self.js(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); "
            "e.scrollIntoView({block: 'center'}); const r = e.getBoundingClientRect(); "
            "return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left", clickCount=1)

    def screenshot(self, path: Path) -> None:
        """Write what is seen as PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def requests(self) -> list[str]:
        """Return every address that was asked for, the page's own among them."""
        self.js("0")
        sent = [event for event in self.events if event["method"] == "Network.requestWillBeSent"]
        return [event["params"]["request"]["url"] for event in sent]

    def complaints(self) -> list[str]:
        """Return the errors of the page: uncaught, logged, or against its policy."""
        self.js("0")
        bad = []
        for event in self.events:
            if event["method"] == "Runtime.exceptionThrown":
                bad.append(str(event["params"]["exceptionDetails"]))
            if event["method"] == "Log.entryAdded" and event["params"]["entry"]["level"] == "error":
                bad.append(event["params"]["entry"]["text"])
        return bad
