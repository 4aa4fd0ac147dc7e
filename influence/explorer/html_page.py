"""One HTML file that holds its own data: a draft that packs numbers, the finished page, and a server for it."""

import base64
import hashlib
import html
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy
from torch import Tensor

from influence.store import output_file

LARGEST = 400_000_000
"""Most characters of a page; browsers refuse a text of half a billion."""
LARGEST_INLINE = 20_000_000
"""Most characters of a page that a notebook keeps as a cell's output."""
LOOPBACK = "127.0.0.1"
OUR_HOSTS = (LOOPBACK, "localhost")


@dataclass(frozen=True, repr=False)
class Page:
    """A finished page: one HTML text with everything inside it. In a notebook it shows itself.

    Attributes:
        html: the text.
        count: how many examples it shows.
    """

    html: str
    count: int

    def save(self, path: str | Path, overwrite: bool = False) -> Path:
        """Write the page to a file, whole or not at all.

        Args:
            path: the file; its folder is made.
            overwrite: replace a file that is there.

        Returns:
            The file.

        Raises:
            FileExistsError: if the file is there already.
        """
        path = Path(path)
        if path.exists() and not overwrite:
            raise FileExistsError(f"{path} exists already: pass overwrite=True to replace it, or another path")
        with output_file(path) as temporary:
            temporary.write_text(self.html, encoding="utf-8")
        return path

    def serve(self, port: int = 0, say: Callable[[str], None] = print) -> None:
        """Serve the page to this machine alone, at 127.0.0.1, until interrupted (Ctrl-C).

        Args:
            port: the port; 0 takes a free one.
            say: called with the address.

        Raises:
            ValueError: if the port is taken or out of range.
        """
        with server(self.html, port) as serving:
            say(f"serving at http://{LOOPBACK}:{serving.server_address[1]}/ until Ctrl-C")
            try:
                serving.serve_forever()
            except KeyboardInterrupt:
                say("")

    def __repr__(self) -> str:
        """Return the page in a line."""
        return f"<page of {self.count:,} examples, {len(self.html) / 1e6:,.1f} MB: .save(path), .serve()>"

    def _repr_html_(self) -> str:
        """Return the page in a frame, for notebooks, or a line where it is too large to be kept in one."""
        if len(self.html) > LARGEST_INLINE:
            return f"<code>{html.escape(repr(self))}</code>"
        style = "width:100%;height:800px;border:0"
        return f'<iframe sandbox="allow-scripts" style="{style}" srcdoc="{html.escape(self.html)}"></iframe>'


class Draft:
    """A page while it is filled.

    Attributes:
        facts: the page's JSON.
    """

    def __init__(self, facts: Mapping[str, Any]) -> None:
        """Begin a page with some facts."""
        self.facts = dict(facts)
        self._packed: list[str] = []

    def pack(self, values: Tensor) -> dict[str, Any]:
        """Store numbers `[rows, …]`, and return how the JSON refers to them: id, type, and numbers in a row.

        Floats become float32; whole numbers the narrowest type that holds them exactly; all little-endian.
        """
        array = values.float().numpy() if values.is_floating_point() else values.numpy()
        if array.dtype == numpy.int64:  # places and counts, which are not negative
            array = array.astype(numpy.min_scalar_type(int(array.max()) if array.size else 0))
        array = numpy.ascontiguousarray(array, array.dtype.newbyteorder("<"))
        self._packed.append(base64.b64encode(array.tobytes()).decode())
        width = int(numpy.prod(array.shape[1:], dtype=int))
        return {"id": f"numbers-{len(self._packed)}", "type": array.dtype.str[1:], "width": width}

    def finish(self) -> Page:
        """Return the page: nothing in it comes from elsewhere, and its policy runs no script but its own."""
        parts = {"css": _file("css"), "js": f"{_file('data.js')}\n{_file('js')}"}
        numbers = [
            f'<script type="application/octet-stream" id="numbers-{n + 1}">{text}</script>'
            for n, text in enumerate(self._packed)
        ]
        values = {
            "title": html.escape(str(self.facts.get("title", "influence"))),
            "policy": f"default-src 'none'; style-src {_hash(parts['css'])}; script-src {_hash(parts['js'])}",
            "facts": script_safe(json.dumps(self.facts, ensure_ascii=False, separators=(",", ":"))),
            "numbers": "\n".join(numbers),
            **parts,
        }
        return Page(re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], _file("html")), self.facts["count"])


def script_safe(text: str) -> str:
    r"""Return JSON that cannot end the script element around it, whatever texts it holds.

    Example:
        >>> script_safe('["</script>"]')
        '["\\u003c/script>"]'
    """
    return text.replace("<", "\\u003c").encode("utf-8", "replace").decode()


def server(page: str, port: int = 0) -> ThreadingHTTPServer:
    """Return a server of one HTML text, bound to the loopback address and not yet serving."""
    body = page.encode()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            # a request under another host name is a web page elsewhere that wants to read this one
            ours = (self.headers.get("Host") or "").rpartition(":")[0] in OUR_HOSTS
            found = ours and self.path.partition("?")[0] == "/"
            self.send_response(200 if found else 404)
            self.send_header("Content-Type", "text/html; charset=utf-8" if found else "text/plain")
            self.send_header("Content-Length", str(len(body) if found else 0))
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            if found:
                self.wfile.write(body)

        def log_message(self, format: str, *values: object) -> None:
            """Keep requests out of the terminal."""

    try:
        return ThreadingHTTPServer((LOOPBACK, port), Handler)
    except (OSError, OverflowError) as error:
        raise ValueError(f"port {port} cannot be used ({error}): pass another port, or 0 for a free one") from error


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _file(name: str) -> str:
    return files("influence.explorer").joinpath(f"explorer.{name}").read_text()
