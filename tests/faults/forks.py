"""Children that are forked from a process which has imported everything, armed, limited, and watched until they end.

The process itself must run with the shim loaded (`preloaded` starts it again so), single-threaded, without a torch or
tokenizer thread, so that a fork is safe.
"""

import ctypes
import hashlib
import json
import os
import re
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SHIM = Path(__file__).with_name("shim.c")
BUILT = Path(__file__).parents[2] / "build" / "faults"
"""Where it is compiled to."""
LIMIT = 120.0
"""Seconds that a child may take by the clock, on a machine that is busy with other things."""
COMPUTES = 10
"""Seconds that it may compute."""
UNFORESEEN = re.compile(r"^influence [a-z]+: unexpected \w+: ", re.M)
"""How the command line begins to say what nobody foresaw."""
FOREIGN = 3
"""Exit status of a child whose function raised what no user should see."""


def preloaded(module: str, arguments: Sequence[str]) -> None:
    """Start this process again with the shim before the C library, unless it is there already."""
    if os.environ.get("FAULTS_SHIM"):
        del os.environ["LD_PRELOAD"]
        return
    library = BUILT / f"shim-{hashlib.sha256(SHIM.read_bytes()).hexdigest()[:16]}.so"
    if not library.exists():
        BUILT.mkdir(parents=True, exist_ok=True)
        made = library.with_suffix(f".{os.getpid()}")
        subprocess.run(["cc", "-O1", "-Wall", "-Werror", "-shared", "-fPIC", "-o", made, SHIM, "-ldl"], check=True)
        made.replace(library)
    quiet = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "ARROW_NUM_THREADS": "1"}
    environment = {**os.environ, **quiet, "LD_PRELOAD": str(library), "FAULTS_SHIM": str(library)}
    os.execve(sys.executable, [sys.executable, "-m", module, *arguments], environment)


@dataclass(frozen=True)
class Kill:
    """When a child is to die.

    Attributes:
        at: number of the event it dies at; 0 counts alone.
        half: a write is done by half first.
        later: seconds by which its time of day is ahead.
    """

    at: int = 0
    half: bool = False
    later: int = 0


COUNT = Kill()
"""Count, and kill nobody."""


@dataclass(frozen=True)
class Ended:
    """How a child ended.

    Attributes:
        status: its exit status; minus the signal that ended it; `None` if it hung and was killed for it.
        said: standard output and error.
        complained: standard error.
        value: what its function returned, as JSON.
        events: what it did to files, each `number what path`.
        seconds: how long it took.
    """

    status: int | None
    said: str
    complained: str
    value: Any = None
    events: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def fault(self) -> str | None:
        """What kind of fault this end is; `None` for success and for a refusal that says why."""
        if self.status in (None, -signal.SIGXCPU):
            return "hang"
        if self.status is not None and self.status < 0:
            return "signal"
        text = self.complained
        if self.status == FOREIGN or "Traceback" in text or UNFORESEEN.search(text):
            return "traceback"
        if self.status not in (0, 1):
            return "traceback"
        return None

    @property
    def refused(self) -> bool:
        """Whether it said no, in one paragraph."""
        return self.status == 1 and self.fault is None

    def brief(self) -> str:
        """Return its end in a line."""
        last = " ".join(self.complained.split())[-300:]
        return f"status {self.status}: {last}"


def forked(
    work: Callable[[], Any],
    folder: Path,
    kill: Kill = COUNT,
    limit: float = LIMIT,
    memory: int | None = None,
    start: int | None = None,
) -> "Child":
    """Fork a child that works in a folder.

    Args:
        work: what it does; an `int` it returns is its exit status, anything else is written as JSON.
        folder: its working directory, under which events are counted.
        kill: count events, and die at one.
        limit: seconds that it may take.
        memory: bytes that it may map beyond what it has at the fork.
        start: a descriptor to read a byte of before it begins.
    """
    log = Path(tempfile.mkdtemp(prefix="child-", dir=folder.parent))
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return Child(pid, log, limit)
    status = FOREIGN
    try:
        os.chdir(folder)
        for name, number in (("out", 1), ("err", 2)):
            handle = os.open(log / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            os.dup2(handle, number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdin, sys.stdout, sys.stderr = (os.fdopen(n, mode) for n, mode in enumerate(("r", "w", "w")))
        resource.setrlimit(resource.RLIMIT_CPU, (COMPUTES, COMPUTES + 1))
        if memory is not None:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + memory, used + memory))
        if start is not None:
            os.read(start, 1)
        events = os.open(log / "events", os.O_WRONLY | os.O_CREAT, 0o600)
        shim = ctypes.CDLL(os.environ["FAULTS_SHIM"])
        shim.faults_arm(
            os.fsencode(folder.resolve()), ctypes.c_long(kill.at), int(kill.half), events, ctypes.c_long(kill.later)
        )
        value = work()
        status = value if isinstance(value, int) else 0
        if not isinstance(value, int):
            (log / "value").write_text(json.dumps(value))
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status)
    raise AssertionError


@dataclass(frozen=True)
class Child:
    """A child that was forked."""

    pid: int
    log: Path
    limit: float

    def wait(self) -> Ended:
        """Wait until it ends, or until its time is up."""
        began = time.monotonic()
        handle = os.pidfd_open(self.pid)
        over = not select.select([handle], [], [], self.limit)[0]
        if over:
            os.kill(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        os.close(handle)
        out, err, value, events = ((self.log / name) for name in ("out", "err", "value", "events"))
        said = {path: path.read_text(errors="replace") if path.exists() else "" for path in (out, err, value, events)}
        for path in self.log.iterdir():
            path.unlink()
        self.log.rmdir()
        return Ended(
            None if over else os.waitstatus_to_exitcode(status),
            said[out] + said[err],
            said[err],
            json.loads(said[value]) if said[value] else None,
            said[events].splitlines(),
            time.monotonic() - began,
        )


def refusing(work: Callable[[], Any]) -> Callable[[], Any]:
    """Return a function of Python as a command: what it refuses is a paragraph and status 1, as on the command line."""

    def run() -> Any:
        from influence.cli import paragraph

        try:
            value = work()
        except Exception as error:
            text = paragraph(error)
            if text.startswith("unexpected "):
                traceback.print_exc()
                return FOREIGN
            print(f"python: {type(error).__name__}: {text}", file=sys.stderr)
            return 1
        return 0 if value is None else value

    return run
