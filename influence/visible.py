"""What comes from data, file names and runs, as a terminal may show it: no code in it is obeyed, all of it is seen."""

import re

CODES = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u180e\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff"
    r"\U000e0000-\U000e007f]"
)
"""What moves, colours, erases, hides or turns round what is printed: the control codes but for tab and newline, the
codes that change the direction of writing, those that are seen as nothing, and bytes of a file name that are no text.
Joiners of letters and of emoji stay, which their scripts need."""


def visible(text: str, lines: bool = True) -> str:
    r"""Return a text whose control codes are spelt out as Python spells them.

    Everything that the command line prints of data, of file names and of what runs say goes through here.

    Args:
        text: the text.
        lines: whether it may have several lines; otherwise a newline and a tab are spelt out too.

    Example:
        >>> visible("red: \x1b[31m; back: \u202e; home: \r\n") == r"red: \x1b[31m; back: \u202e; home: \r" + "\n"
        True
        >>> visible("a\nb", lines=False) == r"a\nb"
        True
    """
    shown = CODES.sub(_spelt, text)
    return shown if lines else shown.replace("\n", "\\n").replace("\t", "\\t")


def _spelt(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode()
