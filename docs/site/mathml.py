"""A hook of MkDocs: formulas become MathML while the site is built, so that a page needs no script and no network."""

import html
import re
from typing import Any

from latex2mathml.converter import convert

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(page_html: str, **_: Any) -> str:
    """Replace what arithmatex found, in pages and in docstrings, by MathML."""
    return FORMULA.sub(rendered, page_html)


def rendered(found: re.Match[str]) -> str:
    """Return one formula as MathML.

    Raises:
        ValueError: naming the formula that could not be read, which stops the build.
    """
    formula = html.unescape(found[3]).strip()
    display = "block" if found[2] == "[" else "inline"
    try:
        return convert(formula, display=display)
    except Exception as error:
        raise ValueError(f"no formula that latex2mathml reads: {formula!r} ({error!r})") from error
