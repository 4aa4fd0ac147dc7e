"""Texts of a stranger's: templates without an end, YAML that stands for more than it is, documents too large."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from influence.cli import main
from influence.data import TextFormat, child, load, parsing, templates, tokenize
from influence.data.child import ItemError, Limits
from influence.data.parsing import yaml_of
from influence.data.templates import Template
from influence.pipelines.frame.config_file import read_config
from influence.pipelines.frame.configs import DataConfig
from influence.pipelines.frame.texts import texts_of
from tests import tokenizers_zoo as zoo
from tests.pipeline_world import world

ENDLESS = {
    "loops in loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a list of itself, sixty times": "{% set n = namespace(x=[0]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}"
    "{% endfor %}{{ n.x == [0] ~ n.x }}",
    "a power": "{% set x = 7 ** (7 ** 11) %}",
    "comparisons": "{% set r = range(99999)|list %}{% for i in r %}{% if -1 in r %}{% endif %}{% endfor %}",
}
LARGE = {
    "a text times a number": "{{ 'a' * 10 ** 10 }}",
    "a list times a number": "{{ ([0] * 10 ** 10)|length }}",
    "a text doubled": "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "a filter": "{{ 'a'|center(10 ** 11) }}",
    "a format": "{{ '%99999999999s' % 1 }}",
    "a method": "{{ 'a'.ljust(10 ** 11) }}",
    "replacements": "{{ 'aa'|replace('a', 'b' * 10 ** 6)|replace('b', 'c' * 10 ** 6) }}",
    "much output": "{% for i in range(99999) %}{% for j in range(99999) %}{{ 'a' * 10 ** 5 }}{% endfor %}{% endfor %}",
}
QUICK = Limits(seconds=0.5, memory=1 << 28, result=1 << 20)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lower the limits, that tests be quick."""
    monkeypatch.setattr(child, "LIMITS", QUICK)


@pytest.mark.parametrize("source", ENDLESS.values(), ids=[*ENDLESS])
def test_a_template_without_an_end_is_stopped(source: str, quick: None) -> None:
    template = Template("{% if not a %}" + source + "{% endif %}{{ a }}")
    with pytest.raises(ValueError, match=r"row \d: the template was stopped after 0.5 seconds"):
        tokenize(load([{"a": "ok"}, {"a": ""}]), zoo.bpe(), TextFormat(template=template))


@pytest.mark.parametrize("source", LARGE.values(), ids=[*LARGE])
def test_a_template_that_makes_too_much_is_stopped(source: str, quick: None) -> None:
    with pytest.raises(ValueError, match="row 0: ") as refusal:
        tokenize(load([{"a": "ok"}]), zoo.bpe(), TextFormat(template=Template(source)))
    assert any(word in str(refusal.value) for word in ("needs more than 268,435,456 bytes", "too large", "was stopped"))


def test_a_result_that_is_too_long_is_refused(quick: None) -> None:
    with pytest.raises(ValueError, match="row 0: the template failed: it makes more than 1,048,576 characters"):
        tokenize(load([{"a": "ok"}]), zoo.bpe(), TextFormat(template=Template("{{ a * 1000000 }}")))


@pytest.mark.parametrize("source", [*ENDLESS.values(), *LARGE.values()], ids=[*ENDLESS, *LARGE])
def test_a_chat_template_is_stopped_too(source: str, quick: None) -> None:
    talk = {"m": [{"role": "user", "content": "ok"}, {"role": "assistant", "content": " yes"}]}
    with pytest.raises(ValueError, match=r"row 0: the chat template"):
        tokenize(load([talk]), zoo.bpe(chat=source + zoo.CHAT), TextFormat(conversation_column="m"))


def test_prompts_and_the_texts_of_a_query_are_rendered_apart_too(quick: None, tmp_path: Path) -> None:
    endless = Template(ENDLESS["loops in loops"], "b")
    rows = load([{"a": "ok", "b": "yes", "r": 1.0}])
    from influence.data.slices import slice_reader

    with pytest.raises(ValueError, match="the template was stopped"):
        slice_reader(rows, zoo.bpe(), TextFormat(template=endless), None, False, "r").prompts([*rows])
    (tmp_path / "rows.jsonl").write_text('{"a": "ok"}\n')
    (tmp_path / "endless.yaml").write_text(json.dumps({"doc_to_text": ENDLESS["loops in loops"]}))
    data = DataConfig(str(tmp_path / "rows.jsonl"), template=str(tmp_path / "endless.yaml"))
    assert "the template was stopped" in texts_of(data, None, None)([0])[0]


def test_what_is_made_apart_is_what_is_made_here() -> None:
    items = ["", "a\n\u2028\ud800", "é" * 1000, None, 1, [1.5, {"a": True}]]
    assert child.in_child(lambda item: item, items, "it") == child.one_by_one(lambda item: item, items) == items
    assert child.in_child(lambda item: item, [], "it") == []
    seen: list[int] = []
    assert child.in_child(lambda item: seen.append(item), [1], "it") == [None]
    assert seen == []  # a child's memory is its own


def test_errors_apart_say_of_which_item_and_what() -> None:
    def refuse(item: int) -> int:
        if item == 2:
            raise ValueError("not two")
        return 1 // (item - 3)

    for function in (child.one_by_one, lambda *given: child.in_child(*given, "it")):
        with pytest.raises(ItemError, match=r"^not two$") as refusal:
            function(refuse, [0, 1, 2, 3])
        assert refusal.value.item == 2
    with pytest.raises(ItemError, match=r"^it failed: ZeroDivisionError") as refusal:
        child.in_child(refuse, [0, 3], "it")
    assert refusal.value.item == 1
    with pytest.raises(ItemError, match=r"^it ended its process \(status 3"):
        child.in_child(lambda item: os._exit(3), [0], "it")


def test_no_child_is_left_and_no_file_is_open() -> None:
    before = len(os.listdir("/proc/self/fd"))
    for function in (lambda item: item, lambda item: os._exit(1), lambda item: 1 // 0):
        with contextlib.suppress(ItemError):
            child.in_child(function, [1, 2], "it")
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_child_ends_with_its_parent(tmp_path: Path) -> None:
    """A parent that is killed leaves nobody behind who holds its locks."""
    script = (
        "import os, signal, sys\nfrom influence.data.child import Limits, in_child\n"
        "def work(item):\n    open(sys.argv[1], 'w').write(str(os.getpid()))\n"
        "    os.kill(os.getppid(), signal.SIGKILL)\n    while True: pass\n"
        "in_child(work, [0], 'it', Limits(seconds=600))\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "pid")], check=False)
    assert done.returncode == -9
    child = int((tmp_path / "pid").read_text())
    for _ in range(200):
        if not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split()[2]:
            return
        time.sleep(0.05)
    raise AssertionError(f"process {child} is still there")


# YAML


def test_yaml_that_stands_for_more_than_it_is(tmp_path: Path) -> None:
    bomb = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{b}: &{b} [{', '.join('*' + a for _ in range(10))}]\n" for a, b in zip("abcdefghi", "bcdefghij", strict=True)
    )
    with pytest.raises(ValueError, match=r"it has .* values, aliases counted"):
        yaml_of(bomb, "it")
    (tmp_path / "config.yaml").write_text(bomb)
    with pytest.raises(ValueError, match=r"config\.yaml has .* values, aliases counted"):
        read_config(tmp_path / "config.yaml")
    with pytest.raises(ValueError, match=r"t has .* values, aliases counted"):
        templates.parse("doc_to_text: a\n" + bomb, "t")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("[" * 2000, "it is no YAML"),
        ("a: 2001-99-99", "it is no YAML"),
        ("x" * (1 << 21), "it has 2,097,152 characters, and settings have at most"),
        ("!!python/object/apply:os.system ['true']", "it is no YAML"),
    ],
    ids=["nested", "no date", "long", "an object"],
)
def test_yaml_that_is_none(text: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        yaml_of(text, "it")


def test_a_configuration_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"config\.yaml, line 1, is no text"):
        read_config(tmp_path / "config.yaml")


# Documents


def oracle(raw: bytes) -> tuple[int, int]:
    """The deepest nesting of brackets, and the longest row, character by character."""
    depth = deepest = longest = begin = at = 0
    base, text = int(raw.lstrip().startswith(b"[")), False
    while at < len(raw):
        letter = raw[at : at + 1]
        if letter == b"\\":
            at += 2
            continue
        if letter == b"\n":
            text = False
        elif letter == b'"':
            text = not text
        if not text and letter in b"[{":
            depth += 1
            deepest = max(depth, deepest)
        if not text and letter in b"]}":
            depth -= 1
        if not text and letter in b"]}\n" and depth <= base:
            longest, begin = max(longest, at - begin), at
        at += 1
    return deepest, max(longest, len(raw) - begin)


VALUES = st.recursive(
    st.text('ab"\\[]{}\n,é', max_size=8) | st.integers() | st.none(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('a"\\[{', max_size=3), inner, max_size=3),
    max_leaves=12,
)


@settings(max_examples=80)
@given(rows=st.lists(st.dictionaries(st.text("ab", max_size=2), VALUES, max_size=3), max_size=6), data=st.data())
def test_rows_are_measured_as_they_are(rows: list[Any], data: Any) -> None:
    kind = data.draw(st.sampled_from(["lines", "list", "indented list"]))
    if kind == "lines":
        raw = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8", "surrogatepass")
    else:
        raw = json.dumps(rows, indent=2 if kind == "indented list" else None).encode()
    deepest, longest = oracle(raw)
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(parsing, "AT_ONCE", data.draw(st.integers(1, 40))):
        path = Path(folder) / "rows.json"
        path.write_bytes(raw)
        with mock.patch.object(parsing, "DEEPEST", deepest):
            parsing.check_files([path], max(longest, 1))
            if longest > 1:
                with pytest.raises(ValueError, match=r"rows\.json has a row of .* max_document_bytes="):
                    parsing.check_files([path], longest - 1)
        if deepest:
            with (
                mock.patch.object(parsing, "DEEPEST", deepest - 1),
                pytest.raises(ValueError, match=r"rows\.json, line \d+, is nested too deeply"),
            ):
                parsing.check_files([path], max(longest, 1))


DEEP = {
    "lists": "[" * 100_000 + "]" * 100_000,
    "dictionaries": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "lists in lines": "[\n" * 100_000 + "]\n" * 100_000,
    "lists behind a text without an end": '"\n' + "[" * 100_000,
}


@pytest.mark.parametrize("kind", DEEP)
def test_a_row_that_is_too_deep_kills_nobody(kind: str, tmp_path: Path) -> None:
    """Readers of JSON go down a step of the stack for each bracket, and end the process."""
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"text": "b", "more": ' + DEEP[kind] + "}\n")
    for source in (tmp_path / "rows.jsonl", tmp_path):
        with pytest.raises(ItemError, match=r"rows\.jsonl, line \d+, is nested too deeply: it has more than 100"):
            child.in_child(lambda path: len(load(str(path))), [source], "reading")


def test_a_row_that_is_too_large_is_refused_before_a_reader_meets_it(tmp_path: Path) -> None:
    for name, row in (("a.jsonl", '{"text": "%s"}\n'), ("a.csv", "text\n%s\n"), ("a.txt", "%s\n")):
        (tmp_path / name).write_text(row % ("ok " * 100) + row % ("ok " * 1000))
        with pytest.raises(ValueError, match=rf"{name} has a row of 3,0\d\d bytes or more.* max_document_bytes=2000"):
            load(str(tmp_path / name), max_document_bytes=2000)
        assert len(load(str(tmp_path / name), max_document_bytes=4000)) >= 2
    (tmp_path / "list.json").write_text(json.dumps([{"text": "ok"}] * 1000))
    with pytest.raises(ValueError, match=r"list\.json is one list of 16,000 bytes, which is read whole"):
        load(str(tmp_path / "list.json"), max_document_bytes=100)
    assert len(load(str(tmp_path / "list.json"), max_document_bytes=200)) == 1000
    files = {"data_files": str(tmp_path / "a.jsonl")}
    with pytest.raises(ValueError, match="has a row of"):
        load("json", data_kwargs=files, max_document_bytes=2000)


def test_a_text_that_is_too_large_is_refused_before_the_tokenizer_meets_it() -> None:
    rows = load([{"text": "ok"}, {"text": "é" * 100}])
    with pytest.raises(ValueError, match="row 1: its text has 200 bytes, and max_document_bytes=150 is the limit"):
        tokenize(rows, zoo.bpe(), max_document_bytes=150)
    assert len(tokenize(rows, zoo.bpe(), max_document_bytes=200)) == 2
    talk = load([{"m": [{"role": "user", "content": "ok " * 100}, {"role": "assistant", "content": "ok"}]}])
    with pytest.raises(ValueError, match="row 0: its text has 302 bytes"):
        tokenize(talk, zoo.bpe(chat=zoo.CHAT), TextFormat(conversation_column="m"), max_document_bytes=150)


def test_the_command_line_has_the_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["build", tmp_path / "run", "--model", world() / "model", "--dataset", world() / "corpus.jsonl"]
    assert main([str(word) for word in [*flags, "--max-document-bytes", 40]]) == 1
    assert "and --max-document-bytes 40 is the limit" in capsys.readouterr().err
    assert main([str(word) for word in [*flags, "--max-document-bytes", 0]]) != 0
    assert main([str(word) for word in [*flags, "--dry-run"]]) == 0
