"""The command line. Each pipeline is one command; its flags and its help come from its configuration."""

import argparse
import contextlib
import importlib
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from influence import __version__
from influence.pipelines.frame.config_file import FieldError, read_config
from influence.pipelines.frame.flags import as_flags, in_flags, names_of
from influence.terminal import did_you_mean
from influence.visible import visible

COMMANDS = {
    "build": "write an index: one gradient row per example",
    "reduce": "average or sum a dataset's gradients into one row",
    "score": "score a corpus against query rows in one pass",
    "query": "ask an index which examples help or hurt a text",
    "hessian": "fit the curvature of a model on a corpus",
    "mix": "mix the curvature of the queries into the corpus's",
    "trackstar": "recipe: cosines under a mixed curvature (TrackStar)",
    "ekfac": "recipe: influence functions with EK-FAC curvature",
    "trak": "recipe: projected gradients of the log-odds, averaged over checkpoints (TRAK)",
    "tracin": "recipe: gradient products, summed over checkpoints (TracIn)",
    "less": "recipe: Adam's updates against a task's gradients, over checkpoints (LESS)",
    "sample": "run sampling chains around the trained weights and record observables",
    "llc": "estimate the local learning coefficient (LLC), with errors and diagnostics",
    "bif": "Bayesian influence functions: which examples' losses move together",
    "susceptibilities": "measure how each part of a network responds to each token",
    "recall": "judge an index or scores by known answers: recall@k and MRR",
    "inspect": "show what a run holds, its size, and whether it is whole",
    "explore": "write a page to explore an index in a browser",
    "export": "write an index's rows as safetensors, npy or parquet",
}
CONFIGS = {name: f"{name.capitalize()}Config" for name in COMMANDS}

WRITTEN = ("run", "to", "record", "save", "plot")
"""Fields that name what is written."""

FAILED, MISUSED, INTERRUPTED = 1, 2, 130
"""Exit statuses other than 0: refused or failed; not understood; stopped by Ctrl-C."""


class Options(NamedTuple):
    """The flags that every command has."""

    config: str | None
    json: bool
    debug: bool


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: what was typed after `influence`.

    Returns:
        The exit status: 0 if all went well, 1 if the command was refused or failed, 2 if it was not understood, 130
        if it was stopped by Ctrl-C.
    """
    typed = list(sys.argv[1:] if arguments is None else arguments)
    if not typed or typed[0] in ("-h", "--help", "help"):
        print(overview())
        return 0 if typed else MISUSED
    if typed[0] in ("-V", "--version"):
        print(f"influence {__version__}")
        return 0
    command, rest = typed[0], typed[1:]
    if command not in COMMANDS:
        near = did_you_mean(command, COMMANDS)
        return _complain(command, f"there is no such command; there are {', '.join(COMMANDS)}{near}", MISUSED)
    options, flags = common(rest)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("default", UserWarning)  # what a user should know; the rest is for developers
            warnings.showwarning = _show_warning
            run(command, flags, options)
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else MISUSED
    except KeyboardInterrupt:
        return _complain(command, "stopped; an unfinished run goes on when the same is typed again", INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if options.debug:
            raise
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            import traceback

            print(visible(f"rank {os.environ.get('RANK')}: {traceback.format_exc()}"), file=sys.stderr, flush=True)
        return _complain(command, paragraph(error, _names(command)), FAILED)
    return 0


def overview() -> str:
    """Return the help of the whole."""
    lines = [
        "usage: influence COMMAND RUN [flags]",
        "",
        "Which training examples made a network behave this way, and what did it learn, where?",
        "",
        *(f"  {name:16} {says}" for name, says in COMMANDS.items()),
        "",
        "influence COMMAND --help explains a command. A command names its run first: influence build RUN --model …",
        "Every command takes",
        "  --config FILE  read settings from a YAML or JSON file; flags override it. A run's config.yaml replays it",
        "  --json         print the result as JSON on standard output",
        "  --debug        print the traceback of an error",
        "",
        f"Exit status: 0 done; {FAILED} refused or failed, as standard error says; {MISUSED} not understood; "
        f"{INTERRUPTED} stopped by Ctrl-C.",
        "",
        "Share the work of a command among processes:",
        "  torchrun --nproc-per-node 2 -m influence build RUN …",
    ]
    return "\n".join(lines)


def common(flags: Sequence[str]) -> tuple[Options, list[str]]:
    """Take out the options which every command has."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--debug", action="store_true")
    found, rest = parser.parse_known_args(list(flags))
    return Options(found.config, found.json, found.debug), rest


def run(command: str, flags: Sequence[str], options: Options) -> None:
    """Run a command and print what came of it, on the first rank."""
    room, kind = _kind(command)
    config = parse(command, kind, flags, options)
    if not options.debug:
        _quieten()
    say = _say(options.json)
    with _own_loss(config):
        if command == "query" and not config.asks:
            _converse(room, config, say)
            return
        outcome = room.run(config, say=say)
    if int(os.environ.get("RANK", 0)):
        return
    if options.json:
        print(json.dumps(outcome.facts, default=_plain))
    elif outcome.text:
        print(visible(outcome.text))


@contextlib.contextmanager
def _own_loss(config: Any) -> Iterator[None]:
    """Say of an error in the user's own loss that it is theirs, and its file and line.

    Raises:
        ValueError: saying so; also in the place of `sys.exit`, which would end the command as if it were done.
    """
    loss = getattr(config, "loss", None)
    name = str(getattr(loss, "loss", loss))
    try:
        yield
    except (Exception, SystemExit) as error:
        from influence.pipelines.frame.prepare import raised_at

        place = raised_at(error, name.partition(":")[0])
        if place is None:
            raise
        text = f"{type(error).__name__}: {error}"
        raise ValueError(f"your own loss {name} raised {text} ({place}). --debug shows the traceback") from error


def _kind(command: str) -> tuple[Any, Any]:
    """Return a command's pipeline, and the type of its configuration."""
    room = importlib.import_module(f"influence.pipelines.{command}")
    return room, getattr(room, CONFIGS[command])


def _names(command: str) -> dict[str, str]:
    """Return the arguments that are flags of a command; none where it cannot even be imported."""
    with contextlib.suppress(ImportError):
        return names_of(_kind(command)[1])
    return {}


def parse(command: str, kind: Any, flags: Sequence[str], options: Options) -> Any:
    """Return the configuration that a file and flags describe; flags win.

    Raises:
        SystemExit: after tyro said what it did not understand.
    """
    import tyro

    words = list(flags) if options.config is None else _with_settings(kind, options.config, flags)
    config = tyro.cli(kind, args=words, prog=f"influence {command}", description=description_of(kind))
    for name in WRITTEN:
        path = getattr(config, name, None)
        if isinstance(path, str) and (seen := visible(path, lines=False)) != path:
            flag = "RUN" if name == "run" else f"--{name}"
            raise ValueError(f"{flag} {seen} has a control code in it, such as a newline: give a path without one")
    return config


def _with_settings(kind: Any, path: str, flags: Sequence[str]) -> list[str]:
    """Return flags behind those of a file, so that they win; RUN, where it is typed, stands before all."""
    settings = read_config(path)
    named = [word for word in flags[:1] if not word.startswith("-")]
    if named:
        settings.pop("run", None)
    try:
        return [*named, *as_flags(kind, settings), *flags[len(named) :]]
    except FieldError as error:
        raise FieldError(f"{path}: {error}") from error


def description_of(kind: Any) -> str:
    """Return a command's help: its docstring without the attributes, which become the flags."""
    text = (kind.__doc__ or "").split("Attributes:")[0]
    about = "\n".join(line.strip() for line in text.strip().splitlines())
    return f"{about}\n\nEvery command also takes --config FILE, --json and --debug: see influence --help."


def paragraph(error: BaseException, names: Mapping[str, str] | None = None) -> str:
    """Return an error as one paragraph, in the words of the command line.

    What nobody foresaw says so: its type, and how to see more.

    Args:
        error: the error.
        names: the flags of arguments of Python.

    Returns:
        The paragraph.
    """
    # nothing is caught here: these are foreseen, so their message alone is said
    known = (ValueError, OSError, ImportError, NotImplementedError, MemoryError)
    text = " ".join(visible(_message(error)).split()) or "no message"
    if not isinstance(error, FieldError):  # which speaks of a file of settings
        text = in_flags(text, names or {})
    if not isinstance(error, known) and type(error).__name__ not in ("EngineError", "RankFailed"):
        text = f"unexpected {type(error).__name__}: {text}. --debug shows where"
    return text


def _message(error: BaseException) -> str:
    if isinstance(error, OSError) and error.errno is not None and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else str(error.strerror)
    if isinstance(error, KeyError) and error.args:
        return f"no {error.args[0]!r}"
    return str(error)


def _complain(command: str, text: str, status: int) -> int:
    print(visible(f"influence {command}: {text}", lines=False), file=sys.stderr)
    return status


def _show_warning(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
    print(f"influence: note: {' '.join(visible(str(message)).split())}", file=sys.stderr)


def _quieten() -> None:
    """Keep the progress bars and the reports of others out of ours."""
    import datasets
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()


def _say(machine: bool) -> Callable[[str], None]:
    """Return where a pipeline's lines go: beside the result where that is for machines."""
    out = sys.stderr if machine else sys.stdout
    return lambda line: print(visible(line), file=out, flush=True)


def _plain(value: Any) -> Any:
    """Return what JSON cannot write as what it can."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return str(value)


def _converse(room: Any, config: Any, say: Callable[[str], None]) -> None:
    """Answer what is typed, until there is nothing more."""
    session = room.open_session(config)
    say(session.greeting)
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            say("")
            return
        if text in ("exit", "quit"):
            return
        if not text:
            continue
        try:
            answers = room.ask(session, [text])
            if config.record is not None:
                room.record(config.record, answers)
            say(room.shown(answers, config.width))
        except ValueError as error:
            say(f"  {paragraph(error, names_of(type(config)))}")
