"""Texts of a stranger's: templates without an end, YAML that stands for more than it is, documents too large."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from influence.data import TextFormat, apart, load, templates, tokenize
from influence.data.apart import ItemError, Limits
from influence.data.settings import MOST, read_yaml
from influence.data.templates import Template
from influence.pipelines.configs import DataConfig
from influence.pipelines.plain import read_config
from influence.pipelines.texts import texts_of
from tests import tokenizers_zoo as zoo

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
    monkeypatch.setattr(apart, "LIMITS", QUICK)


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
    from influence.data.reading import reading

    with pytest.raises(ValueError, match="the template was stopped"):
        reading(rows, zoo.bpe(), TextFormat(template=endless), None, False, "r").prompts([*rows])
    (tmp_path / "rows.jsonl").write_text('{"a": "ok"}\n')
    (tmp_path / "endless.yaml").write_text(json.dumps({"doc_to_text": ENDLESS["loops in loops"]}))
    data = DataConfig(str(tmp_path / "rows.jsonl"), template=str(tmp_path / "endless.yaml"))
    assert "the template was stopped" in texts_of(data, None, None)([0])[0]


def test_what_is_made_apart_is_what_is_made_here() -> None:
    items = ["", "a\n\u2028\ud800", "é" * 1000, None, 1, [1.5, {"a": True}]]
    assert apart.apart(lambda item: item, items, "it") == apart.each(lambda item: item, items) == items
    assert apart.apart(lambda item: item, [], "it") == []
    seen: list[int] = []
    assert apart.apart(lambda item: seen.append(item), [1], "it") == [None]
    assert seen == []  # a child's memory is its own


def test_errors_apart_say_of_which_item_and_what() -> None:
    def refuse(item: int) -> int:
        if item == 2:
            raise ValueError("not two")
        return 1 // (item - 3)

    for function in (apart.each, lambda *given: apart.apart(*given, "it")):
        with pytest.raises(ItemError, match=r"^not two$") as refusal:
            function(refuse, [0, 1, 2, 3])
        assert refusal.value.item == 2
    with pytest.raises(ItemError, match=r"^it failed: ZeroDivisionError") as refusal:
        apart.apart(refuse, [0, 3], "it")
    assert refusal.value.item == 1
    with pytest.raises(ItemError, match=r"^it ended its process \(status 3"):
        apart.apart(lambda item: os._exit(3), [0], "it")


def test_no_child_is_left_and_no_file_is_open() -> None:
    before = len(os.listdir("/proc/self/fd"))
    for function in (lambda item: item, lambda item: os._exit(1), lambda item: 1 // 0):
        with contextlib.suppress(ItemError):
            apart.apart(function, [1, 2], "it")
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_child_ends_with_its_parent(tmp_path: Path) -> None:
    """A parent that is killed leaves nobody behind who holds its locks."""
    script = (
        "import os, signal, sys\nfrom influence.data.apart import Limits, apart\n"
        "def work(item):\n    open(sys.argv[1], 'w').write(str(os.getpid()))\n"
        "    os.kill(os.getppid(), signal.SIGKILL)\n    while True: pass\n"
        "apart(work, [0], 'it', Limits(seconds=600))\n"
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
    with pytest.raises(ValueError, match=f"stands for more than {MOST:,} items"):
        read_yaml(bomb, "it")
    (tmp_path / "config.yaml").write_text(bomb)
    with pytest.raises(ValueError, match=r"config\.yaml stands for more than"):
        read_config(tmp_path / "config.yaml")
    with pytest.raises(ValueError, match="stands for more than"):
        templates.parse("doc_to_text: a\n" + bomb, "t")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("[" * 2000, "it is no YAML"),
        ("a: 2001-99-99", "it is no YAML"),
        ("x" * (1 << 21), "it has 2,097,152 characters; settings have at most"),
        ("!!python/object/apply:os.system ['true']", "it is no YAML"),
    ],
    ids=["nested", "no date", "long", "an object"],
)
def test_yaml_that_is_none(text: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        read_yaml(text, "it")


def test_a_configuration_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"config\.yaml is no text"):
        read_config(tmp_path / "config.yaml")
