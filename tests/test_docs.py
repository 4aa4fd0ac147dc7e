"""The documentation is true: its examples run, its links lead somewhere, and it names everything public."""

import ast
import builtins
import doctest
import importlib
import inspect
import itertools
import re
import types
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import influence

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in DOCS.rglob("*.md"))
FENCE = re.compile(r"^```(python|pycon)[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)
FOLDERS = ("attribute", "data", "explorer", "hessians", "index", "models", "sgmcmc", "store", "train", "viz")
ROOMS = (*FOLDERS, "func.similarity", "func.sinks")


def examples(page: str) -> list[tuple[str, str, int]]:
    """Return the examples of a page: language, source, line."""
    text = (ROOT / page).read_text()
    return [(found[1], found[2], text[: found.start(2)].count("\n")) for found in FENCE.finditer(text)]


def run(page: str) -> dict[str, Any]:
    """Run every example of a page, one after the other; a session has to print what it says."""
    names: dict[str, Any] = {"__name__": "page"}
    for language, source, line in examples(page):
        if language == "python":
            exec(compile("\n" * line + source, page, "exec"), names)
            continue
        session = doctest.DocTestParser().get_doctest(source, {}, page, page, line)
        session.globs = names
        runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS, verbose=False)
        said: list[str] = []
        runner.run(session, out=said.append, clear_globs=False)
        assert not runner.failures, "".join(said)
    return names


# What these pages' examples must come to stands in test_readme.py, which runs them.
ELSEWHERE = [f"docs/{name}.md" for name in ("curvature", "training", "formats", "search", "sampling")]


@pytest.mark.parametrize("page", [page for page in PAGES if page not in ELSEWHERE and examples(page)])
def test_examples_run_and_print_what_they_say(page: str) -> None:
    run(page)


def test_an_example_that_prints_something_else_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "page.md").write_text("```python\none = 1\n```\n\n```pycon\n>>> one\n2\n```\n")
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    with pytest.raises(AssertionError, match="Expected"):
        run("page.md")


def public() -> Iterator[tuple[str, Any]]:
    """Yield every name that an `__init__` exports, and those of the modules among them."""
    for room in ("", *ROOMS):
        module = importlib.import_module(f"influence.{room}".rstrip("."))
        for name in getattr(module, "__all__", None) or of_its_own(module):
            yield f"{module.__name__}.{name}", getattr(module, name)


def of_its_own(module: types.ModuleType) -> list[str]:
    """Return the functions and classes that a module defines and does not hide."""
    named = {n: v for n, v in vars(module).items() if not n.startswith("_") and getattr(v, "__doc__", None)}
    return [n for n, v in named.items() if getattr(v, "__module__", None) == module.__name__]


def documented() -> Iterator[Any]:
    """Yield every object that an API page shows: `::: name`, or some members of it."""
    for page in (DOCS / "api").glob("*.md"):
        for name, members in re.findall(
            r"^::: (\S+)\n(?:    .*\n)*?(?:      members: \[(.*)\]\n|\n|\Z)", page.read_text(), re.MULTILINE
        ):
            thing = resolve(name)
            yield thing
            yield from (getattr(thing, member) for member in members.split(", ") if member)


def resolve(name: str) -> Any:
    """Return what a dotted name means; a function hides the module it is named after, as it does in Python."""
    module, _, last = name.rpartition(".")
    return getattr(importlib.import_module(module), last)


def test_every_public_name_is_on_an_api_page_and_has_a_docstring() -> None:
    shown = {id(thing) for thing in documented()}
    rooms = {id(importlib.import_module(f"influence.{room}")) for room in ROOMS}
    names = list(public())
    assert len(names) > 150
    missing = [name for name, thing in names if id(thing) not in shown | rooms]
    assert not missing, f"on no page of docs/api: {', '.join(missing)}"
    bare = [name for name, thing in names if not (getattr(thing, "__doc__", None) or "").strip()]
    assert not bare, f"without a docstring: {', '.join(bare)}"


def test_every_room_has_its_names_in_one_list() -> None:
    here = {path.parent.name for path in Path(influence.__file__).parent.glob("*/__init__.py")}
    assert here - {"func", "pipelines"} == {*FOLDERS}


def slug(heading: str) -> str:
    """Return a heading's anchor, as Python-Markdown makes it."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower())


def anchors(path: Path) -> set[str]:
    """Return the anchors of a page's headings."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    return {slug(heading) for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}


@pytest.mark.parametrize("page", ["README.md", "CHANGELOG.md", *PAGES])
def test_links_lead_somewhere(page: str) -> None:
    text = re.sub(r"^```.*?^```|`[^`\n]*`", "", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        path = (ROOT / page).parent / file if file else ROOT / page
        assert path.exists(), f"{page} links to {target}, which is not there"
        assert not anchor or anchor in anchors(path), f"{page} links to {target}; {path.name} has {anchors(path)}"


def test_every_page_is_in_the_navigation_once() -> None:
    nav = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    named = re.findall(r"[\w/-]+\.md", nav)
    assert sorted(f"docs/{name}" for name in named) == PAGES


def test_the_benchmark_page_is_what_the_results_say() -> None:
    from benchmarks import page

    assert page.PAGE.read_text() == page.render(), "run python -m benchmarks report"


def offered() -> dict[str, set[str]]:
    """Return the flags of every command."""
    from influence.cli import COMMANDS, _kind
    from influence.pipelines.frame.flags import _fields

    own = {command: {flag for _, flag in _fields(_kind(command)[1])} for command in COMMANDS}
    return {command: {*flags, "--config", "--json", "--debug"} for command, flags in own.items()}


def ours(page: str) -> Iterator[tuple[str, str]]:
    """Yield what stands right in a page's tables: the heading above the column, and a piece of code."""
    heading = ""
    rows = [line for line in (ROOT / page).read_text().splitlines() if line.startswith("|")]
    for line, below in itertools.pairwise([*rows, ""]):
        cell = re.sub(r"^\||\|$", "", line).split(" | ")[-1].strip()
        heading = cell if below.startswith("|---") else heading
        if cell != heading and not line.startswith("|---"):
            yield from ((heading, code) for code in re.findall(r"`([^`]+)`", cell))


SPACES = ("influence", "influence.train", "influence.sgmcmc", "influence.hessians", "influence.models")
HELD = {"attr": "Attributor", "index": "index.Index", "run": "sgmcmc.Run"}


def meant(name: str) -> Any:
    """Return what a name in a table means: of the package, of its rooms, or of an object that tables call so."""
    if name in vars(builtins) or name in ("partial", "sampler"):
        return None
    first, _, rest = name.partition(".")
    where = [f"influence.{HELD[first]}"] if rest and first in HELD else SPACES
    for space in where:
        thing = resolve(space) if "." in space and space not in SPACES else importlib.import_module(space)
        try:
            for part in (rest if space not in SPACES else name).split("."):
                thing = getattr(thing, part)
        except AttributeError:
            continue
        return thing
    raise AssertionError(f"there is no {name}")


@pytest.mark.parametrize("page", ["docs/from-bergson.md", "docs/from-devinterp.md"])
def test_what_a_migration_page_promises_is_there(page: str) -> None:
    flags, calls, typed = offered(), 0, 0
    anywhere = set().union(*flags.values())
    for heading, code in ours(page):
        if heading == "`influence`":
            words = code.split()
            named = words[0] if words[0] in flags else None
            assert named or words[0].startswith("-") or words[0] == "influence" or len(words) == 1, code
            for flag in re.findall(r"(?<!\S)--[a-z][\w.-]*", code):
                assert flag in (flags[named] if named else anywhere), f"{code}: no {flag}"
            typed += named is not None
            continue
        of_an_index = re.sub(r"^(open_index\(path\))?\.", "index.", code)
        try:
            tree = ast.parse(of_an_index.replace("…", "..."))
        except SyntaxError:
            continue
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            name = ast.unparse(call.args[0] if ast.unparse(call.func) == "partial" else call.func)
            thing = meant(name)
            if thing is not None:
                calls += 1
                known = inspect.signature(thing).parameters
                loose = any(p.kind is p.VAR_KEYWORD for p in known.values())
                wrong = [key.arg for key in call.keywords if key.arg and key.arg not in known and not loose]
                assert not wrong, f"{code}: {name} takes no {wrong[0]}"
    assert calls > 10
    assert typed > 5
