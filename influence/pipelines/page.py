"""One HTML file with its data inside: numbers as base64 that is decoded where it is looked at, texts as JSON."""

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

import numpy
from torch import Tensor

LARGEST = 400_000_000
"""Characters of a page; browsers take half a billion."""


class Page:
    """What a page holds, as it is gathered.

    Attributes:
        facts: what its JSON says.
    """

    def __init__(self, facts: Mapping[str, Any]) -> None:
        """Begin a page with some facts."""
        self.facts = dict(facts)
        self._packed: list[str] = []

    def pack(self, values: Tensor) -> dict[str, Any]:
        """Hold numbers, little-endian and in the narrowest type that is exact for whole ones.

        Args:
            values: `[rows, …]`; floats become float32.

        Returns:
            What the page's JSON says of them: which they are, their type, and how many each row has.
        """
        array = values.float().numpy() if values.is_floating_point() else values.numpy()
        if array.dtype == numpy.int64:  # places and counts, which are not negative
            array = array.astype(numpy.min_scalar_type(int(array.max()) if array.size else 0))
        array = numpy.ascontiguousarray(array, array.dtype.newbyteorder("<"))
        self._packed.append(base64.b64encode(array.tobytes()).decode())
        width = int(numpy.prod(array.shape[1:], dtype=int))
        return {"id": f"numbers-{len(self._packed)}", "type": array.dtype.str[1:], "width": width}

    def html(self) -> str:
        """Return the page.

        Nothing of it comes from elsewhere, and its policy lets no other script run than its own.
        """
        parts = {"css": _file("css"), "js": f"{_file('data.js')}\n{_file('js')}"}
        numbers = [
            f'<script type="application/octet-stream" id="numbers-{n + 1}">{text}</script>'
            for n, text in enumerate(self._packed)
        ]
        filled = {
            "title": escaped(str(self.facts.get("title", "influence"))),
            "policy": f"default-src 'none'; style-src {_hash(parts['css'])}; script-src {_hash(parts['js'])}",
            "facts": script_safe(json.dumps(self.facts, ensure_ascii=False, separators=(",", ":"))),
            "numbers": "\n".join(numbers),
            **parts,
        }
        return re.sub(r"\{\{(\w+)\}\}", lambda match: filled[match[1]], _file("html"))


def script_safe(text: str) -> str:
    r"""Return JSON that cannot end the element it is in, whatever texts it holds.

    Args:
        text: the JSON.

    Returns:
        The same JSON.

    Example:
        >>> script_safe('["</script>"]')
        '["\\u003c/script>"]'
    """
    return text.replace("<", "\\u003c").encode("utf-8", "replace").decode()


def escaped(text: str) -> str:
    """Return a text as HTML shows it."""
    return html.escape(text)


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _file(name: str) -> str:
    return files("influence.pipelines").joinpath(f"explorer.{name}").read_text()
