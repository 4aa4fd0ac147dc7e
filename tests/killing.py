"""Children that are killed at a file event of their choice: forked, so that nothing is imported or built again.

An event is what changes the disk: a file opened to be written, created, renamed, removed, cut, a folder made or
removed; beside these a write (not begun, half done, done), a sync (not begun, done), and the writers of other
libraries that open files out of Python's sight.
"""

import gc
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

AUDITED = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
RANDOM = re.compile(r"[0-9a-f]{16}")


class Events:
    """Counts a process's file events below a directory, and kills it at one: by its number, or by what it is called."""

    def __init__(self, directory: Path, kill_at: int | str | None, report: Callable[[str], object]) -> None:
        self.below, self.kill_at, self.report = os.path.realpath(directory), kill_at, report
        self.count = -1

    def seen(self, what: str, place: Any) -> bool:
        """Count an event; say whether this is the one to die in."""
        path = os.path.realpath(os.fsdecode(place)) if isinstance(place, str | bytes | os.PathLike) else ""
        if not path.startswith(self.below):
            return False
        self.count += 1
        called = f"{what} {RANDOM.sub('*', os.path.relpath(path, self.below))}"
        self.report(f"{called}\n")
        return (
            re.match(self.kill_at, called) is not None if isinstance(self.kill_at, str) else self.count == self.kill_at
        )

    def event(self, what: str, place: Any) -> None:
        if self.seen(what, place):
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in AUDITED:
            mode, flags = arguments[1:3] if event == "open" else ("w", WRITING)
            if (isinstance(mode, str) and set(mode) & set("wax+")) or (mode is None and flags & WRITING):
                self.event(event, arguments[0])

    def install(self) -> None:
        """Watch this process from now on; there is no way back."""
        import safetensors.torch
        import torch

        sys.addaudithook(self.audit)
        write, cut = os.write, os.ftruncate

        def of(handle: int) -> str:
            return os.readlink(f"/proc/self/fd/{handle}")

        def watched_write(handle: int, data: Any) -> int:
            self.event("write", of(handle))
            if self.seen("half a write", of(handle)):
                write(handle, memoryview(data).cast("B")[: len(memoryview(data).cast("B")) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            done = write(handle, data)
            self.event("written", of(handle))
            return done

        def watched_sync(handle: int) -> None:
            """Wait for no disk: a process that is killed loses nothing that the kernel has."""
            self.event("sync", of(handle))
            self.event("synced", of(handle))

        def watched_cut(handle: int, length: int) -> None:
            self.event("cut", of(handle))
            cut(handle, length)
            self.event("was cut", of(handle))

        os.write, os.fsync, os.ftruncate = watched_write, watched_sync, watched_cut  # type: ignore[assignment]
        for owner, name, at in ((torch, "save", 1), (safetensors.torch, "save_file", 1)):
            setattr(owner, name, self._around(getattr(owner, name), at))

    def _around(self, writer: Callable[..., Any], at: int) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            place = args[at] if len(args) > at else kwargs.get("filename", kwargs.get("f"))
            self.event("save", place)
            result = writer(*args, **kwargs)
            self.event("saved", place)
            return result

        return watched


def in_child(work: Callable[[], object], directory: Path, kill_at: int | None = None) -> tuple[int, list[str]]:
    """Run something in a forked child that watches its file events below a directory, and may die at one.

    Returns:
        The child's status as `subprocess` has it (0, or minus the signal), and the events.
    """
    reading, writing = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if not child:
        status = 70
        try:
            os.close(reading)
            warnings.simplefilter("default")  # who is warned goes on
            gc.freeze()  # what was imported is no garbage, and need not be looked through
            plain = os.write
            Events(directory, kill_at, lambda line: plain(writing, line.encode())).install()
            work()
            status = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as lines:
        events = lines.read().splitlines()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), events
