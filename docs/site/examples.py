"""An extension of griffe: a docstring's `Example:` is a section of examples, not a note."""

import re
from typing import Any

import griffe


class Examples(griffe.Extension):
    """Rename the section, which griffe knows in the plural only."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rename it in every docstring."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
