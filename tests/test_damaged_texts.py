"""Files of text that are damaged or somebody else's: settings, templates, gold, lists of queries, states, results."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import page
from influence.cli import Options, main, parse
from influence.data import Tokenized, auto_token_budget, templates
from influence.data.sources import mapping_of
from influence.pipelines.build import BuildConfig
from influence.pipelines.frame import config_file
from influence.pipelines.query import QueryConfig
from influence.pipelines.query import run as ask
from influence.pipelines.recall import read_gold
from influence.pipelines.recipes.checkpoint_sums import learning_rates
from influence.store.folder import read_manifest
from tests.damage import changes

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{after}: &{after} [{', '.join([f'*{before}'] * 10)}]\n"
    for before, after in zip("abcdefgh", "bcdefghi", strict=True)
)
"""YAML of ten lines that means a thousand million values."""

GARBAGE: dict[str, bytes] = {
    "nothing": b"",
    "no UTF-8": b"a: \xff\xfe\n",
    "zeros": bytes(64),
    "a list": b"[1, 2]\n",
    "a number": b"7\n",
    "null": b"null\n",
    "nested too deeply": b"[" * 4_000,
    "an object nested too deeply": b'{"a":' * 4_000,
    "cut off": b'{"a": {"b": [1, "c',
    "a date of the 13th month": b"a: 2024-13-45\n",
    "laughs": LAUGHS.encode(),
    "holds itself": b"a: &a [*a]\n",
    "control codes": b'a: "\x1b[31m"\n',
    "digits without an end": b"a: " + b"9" * 5000 + b"\n",
    "a tag": b"a: !!python/object/apply:os.getcwd []\n",
    "a list for a mapping": b"model: [1]\n",
}


def template(path: Path) -> Any:
    return templates.read(path)


def settings(path: Path) -> Any:
    return parse("build", BuildConfig, [], Options(str(path), json=False, debug=False))


def gold(path: Path) -> Any:
    return read_gold(path)


def texts(path: Path) -> Any:
    return ask(QueryConfig("nothing", file=str(path)))


def trainer(path: Path) -> Any:
    (path.parent / "checkpoint").mkdir(exist_ok=True)
    (path.parent / "checkpoint" / "trainer_state.json").write_bytes(path.read_bytes())
    return learning_rates([str(path.parent / "checkpoint")])


def budgets(path: Path) -> Any:
    rows = Tokenized(torch.arange(6).int(), None, torch.tensor([0, 2, 6]), torch.arange(2))
    return auto_token_budget(lambda batch: None, rows, cache=path, key={"a": 1})


def manifest(path: Path) -> Any:
    (path.parent / "run.json").write_bytes(path.read_bytes())
    return read_manifest(path.parent)


def results(path: Path) -> Any:
    (path.parent / "results").mkdir(exist_ok=True)
    (path.parent / "results" / "a.json").write_bytes(path.read_bytes())
    return page.render(path.parent / "results")


READERS = {reader.__name__: reader for reader in (template, settings, gold, texts, trainer, budgets, manifest, results)}
NAMED = {"manifest": "run.json", "trainer": "checkpoint", "results": "a.json", "texts": ""}
"""What a refusal names, where it is not the file: texts that are read are no failure of the file's."""


@pytest.mark.parametrize("how", GARBAGE)
@pytest.mark.parametrize("reader", READERS)
def test_garbage_is_refused_by_the_name_of_the_file(reader: str, how: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(GARBAGE[how])
    with pytest.raises((ValueError, FileNotFoundError)) as refused:
        READERS[reader](path)
    said = str(refused.value)
    assert NAMED.get(reader, str(path)) in said
    assert len(said) < 1500


def test_a_budget_that_is_there_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "budgets.json"
    assert budgets(path) == 8
    known = json.loads(path.read_text())
    assert budgets(path) == 8
    for wrong in (0, -1, "8", None, [8]):
        path.write_text(json.dumps({name: {**about, "token_budget": wrong} for name, about in known.items()}))
        with pytest.raises(ValueError, match=f"{path} holds no budgets"):
            budgets(path)


STATE = {"global_step": 2, "log_history": [{"step": 1, "learning_rate": 0.5}, {"step": 2, "loss": 1.0}]}


def test_a_trainers_state_with_any_part_of_another_type(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    path = tmp_path / "c" / "trainer_state.json"
    path.write_text(json.dumps(STATE))
    assert learning_rates([str(tmp_path / "c")]) == ([0.5], "logged in trainer_state.json")
    for state in changes(STATE):
        path.write_text(json.dumps(state))
        try:
            rates, _ = learning_rates([str(tmp_path / "c")])
        except ValueError as refused:
            assert str(tmp_path / "c") in str(refused)  # noqa: PT017 -- or it is read, which is as good
        else:
            assert all(rate >= 0 for rate in rates)


def test_results_with_any_part_of_another_type_are_refused_by_their_file(tmp_path: Path) -> None:
    source = next(page.RESULTS.glob("*.json"))
    whole = json.loads(source.read_text())
    path = tmp_path / source.name
    path.write_text(json.dumps(whole))
    good = page.render(tmp_path)
    some = random.Random(0).sample(list(changes(whole)), 300)
    for run in some:
        path.write_text(json.dumps(run))
        try:
            assert page.render(tmp_path)
        except ValueError as refused:
            assert str(path) in str(refused)  # noqa: PT017 -- or it is shown, as what it now says
    assert good


def test_gold_with_any_part_of_another_type(tmp_path: Path) -> None:
    path = tmp_path / "gold.jsonl"
    for line in changes({"query": 0, "gold": [1, 2]}):
        path.write_text(json.dumps(line) + "\n")
        try:
            read_gold(path)
        except ValueError as refused:
            assert str(path) in str(refused)  # noqa: PT017 -- or it is read: without a query, by its place


@pytest.mark.parametrize("name", ["data_kwargs", "sampler_kwargs"])
@pytest.mark.parametrize(
    "how", [how for how in GARBAGE if how not in ("nothing", "null", "no UTF-8", "a list for a mapping")]
)
def test_arguments_in_yaml(name: str, how: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}") as refused:
        mapping_of(GARBAGE[how].decode(), name)
    assert len(str(refused.value)) < 1500


def test_choices_of_a_template_are_not_spelt_out(tmp_path: Path) -> None:
    head = ["doc_to_text: '{{ a }}'", "doc_to_target: a"]
    nested = [*head, "doc_to_choice: [[x, &a [x, x]], *a]"]
    with pytest.raises(ValueError, match="doc_to_choice must be Jinja, a column or a number; got "):
        templates.parse("\n".join(nested))
    with pytest.raises(ValueError, match="doc_to_target must be Jinja, a column or a number; got "):
        templates.parse("doc_to_text: a\ndoc_to_target: [1, 2]")


def test_a_configuration_of_every_wrong_type_is_a_paragraph(tmp_path: Path, capsys: Any) -> None:
    good = {"run": "r", "model": {"model": "m"}, "data": {"dataset": "d"}, "transform": {"targets": ["a"], "power": 0}}
    path = tmp_path / "config.yaml"
    for number, config in enumerate(changes(good)):
        path.write_text(json.dumps(config))
        try:
            config_file.from_mapping(BuildConfig, config_file.read_config(path))
        except ValueError as refused:
            assert len(str(refused)) < 1000  # noqa: PT017 -- or it is a configuration
        if number % 25 == 0:
            assert main(["build", "--config", str(path), "--dry-run"]) in (1, 2)
            assert "unexpected" not in capsys.readouterr().err


def test_what_is_no_number_of_this_machine(capsys: Any) -> None:
    flags = ["build", "r", "--model", "m", "--dataset", "d", "--max-examples"]
    for value in (str(10**30), "9" * 400):
        assert main([*flags, value]) == 2
        assert "--max-examples must be" in " ".join(capsys.readouterr().err.replace("│", " ").split())
