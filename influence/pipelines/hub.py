"""The Hub: names that are no folder here are looked up there, and where it cannot be reached that is said at once."""

import contextlib
import functools
import re
import socket
import urllib.parse
import urllib.request
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from influence.data.sources import BUILDERS

SECONDS = 3.0
"""How long the Hub may take to answer a knock."""


@contextlib.contextmanager
def looked_up(name: str) -> Iterator[None]:
    """Look a name up: a file or folder here, or what the Hub has; without the Hub, what was downloaded before.

    Libraries of the Hub try each of their files for half a minute where there is no network.

    Args:
        name: a path, or an id on the Hub.
    """
    import huggingface_hub.constants

    if (
        not _may_be_there(name)
        or huggingface_hub.constants.HF_HUB_OFFLINE
        or reachable(huggingface_hub.constants.ENDPOINT)
    ):
        yield
        return
    warnings.warn(f"the Hub cannot be reached: {name!r} is looked for among what was downloaded before", stacklevel=3)
    with _offline():
        yield


def _may_be_there(name: str) -> bool:
    place = Path(name).expanduser()
    if place.exists():
        return (place / "adapter_config.json").exists()  # an adapter's base may be on the Hub
    return re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name) is not None and place.suffix.lower() not in BUILDERS


@functools.cache
def reachable(endpoint: str) -> bool:
    """Whether a connection to a web address, or to the proxy before it, can be opened; asked once in a process."""
    asked = urllib.parse.urlsplit(endpoint)
    proxy = None if urllib.request.proxy_bypass(asked.hostname or "") else urllib.request.getproxies().get(asked.scheme)
    place = urllib.parse.urlsplit(proxy) if proxy else asked
    port = place.port or (443 if place.scheme == "https" else 80)
    try:
        socket.create_connection((place.hostname or "", port), SECONDS).close()
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Let the libraries of the Hub read their cache alone, for a while."""
    import datasets.config
    import huggingface_hub.constants

    rooms: tuple[Any, ...] = (huggingface_hub.constants, datasets.config)
    before = [room.HF_HUB_OFFLINE for room in rooms]
    try:
        for room in rooms:
            room.HF_HUB_OFFLINE = True
        yield
    finally:
        for room, was in zip(rooms, before, strict=True):
            room.HF_HUB_OFFLINE = was
