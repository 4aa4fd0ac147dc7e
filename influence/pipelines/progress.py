"""Progress on the first rank: tokens seen, tokens a second, time left."""

import contextlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def progress(
    what: str, total: int, shown: bool | None = None, rank: int = 0, unit: str = "tok"
) -> Iterator[Callable[[int], None]]:
    """Show a bar while work goes on.

    Args:
        what: the work.
        total: tokens of all of it.
        shown: always, never, or (`None`) where there is a terminal.
        rank: only the first one shows anything.
        unit: what is counted.

    Yields:
        A function to call with the number of tokens just seen.
    """
    from tqdm import tqdm

    hidden = True if rank or shown is False else (None if shown is None else False)
    with tqdm(total=total, desc=what, unit=unit, unit_scale=True, disable=hidden, dynamic_ncols=True) as bar:
        yield lambda tokens: bar.update(tokens) and None
