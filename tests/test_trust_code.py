"""Nothing that a file says is executed: metadata of checkpoints, indexes that name code, templates, configurations."""

import ast
import atexit
import functools
import json
import pickle
import pkgutil
import random
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from influence import data, models
from influence.cli import COMMANDS, _kind, main
from influence.data import child, parsing
from influence.data import parsing as sizes
from influence.index import rows as reading
from influence.pipelines import build
from influence.pipelines.chains.finished import tokenizer_of
from influence.pipelines.chains.settings import Sampling
from influence.pipelines.frame.config_file import to_mapping
from influence.pipelines.frame.configs import LossConfig, ModelConfig, TransformConfig
from influence.pipelines.frame.flags import names_of
from influence.store import BadFileError
from influence.store.folder import manifest_of, write_manifest
from influence.train import contents, load_from_optimizer, read_optimizer
from influence.train.checkpoints import read_state
from tests.pipeline_world import build_config, corpus, lines, model_config, world
from tests.shard_optimizer import adam, small

# A table of contents that runs what it names


def word(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text.encode())) + text.encode()


def named(module: str, name: str) -> bytes:
    return word(module) + word(name) + b"\x93"


def called(function: bytes, *given: bytes) -> bytes:
    return function + b"(" + b"".join(given) + b"tR"


def importer() -> bytes:
    """torch's import helper, as `_get_layout` gave it to whoever asked."""
    return called(named("torch.serialization", "_get_layout"), word("torch._import_dotted_name"))


def hostile(ran: Path) -> dict[str, bytes]:
    """Tables of contents which write a file if any of what they say is run."""
    command, metadata = word(f"touch '{ran}'"), "torch.distributed.checkpoint.metadata"
    system = called(importer(), word("os.system"))
    return {
        "the import helper": called(system, command),
        "the import helper, kept": importer() + b"\x94" + word("os.system") + b"\x85R" + command + b"\x85R",
        "by name": called(named("os", "system"), command),
        "by an old name": b"cposix\nsystem\n" + command + b"\x85R",
        "by an instance": b"(" + command + b"iposix\nsystem\n",
        "by an object": b"(" + named("os", "system") + command + b"o",
        "by the metadata's own imports": called(named(metadata, "os.system"), command),
        "by builtins": called(named("builtins", "eval"), word(f"open({str(ran)!r}, 'w')")),
        "by a class of torch": called(named("torch", "load"), word(str(ran))),
        "by a number of copyreg": b"\x82\x01" + command + b"\x85R",
        "by a persistent name": command + b"Q",
        "as a built object": named(metadata, "Metadata")
        + b")\x81}("
        + word("state_dict_metadata")
        + called(system, command)
        + b"ub",
        "as a class's own": named(metadata, "Metadata") + b"N}" + word("__setstate__") + system + b"s\x86b" + b")\x81",
    }


def tables() -> list[str]:
    return list(hostile(Path("x")))


def checkpoint(folder: Path, table: bytes) -> Path:
    """Write a checkpoint whose optimizer is in shards, with such a table of contents."""
    (folder / "optimizer_0").mkdir(parents=True)
    (folder / "optimizer_0" / ".metadata").write_bytes(b"\x80\x04" + table + b".")
    return folder


@pytest.mark.parametrize("kind", tables())
def test_a_table_of_contents_runs_nothing(kind: str, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "checkpoint", hostile(tmp_path / "ran")[kind])
    with pytest.raises(BadFileError, match=r"optimizer_0/\.metadata"):
        load_from_optimizer(small(), folder)
    assert not (tmp_path / "ran").exists()


def test_nothing_runs_where_no_types_are_checked(tmp_path: Path) -> None:
    """The same in a process of its own: the tests' checks of types stop some of these before they run."""
    for kind, table in hostile(tmp_path / "ran").items():
        checkpoint(tmp_path / "all" / kind, table)
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(tmp_path / "all")], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [str(len(tables())), "refused"]
    assert not (tmp_path / "ran").exists()


ALONE = """
import pathlib, sys, types
import influence
room = types.ModuleType("influence.train")  # without what its __init__ imports, which takes long
room.__path__ = [str(pathlib.Path(influence.__file__).parent / "train")]
sys.modules["influence.train"] = room
from influence.train.checkpoints import read_state
refused = 0
for folder in pathlib.Path(sys.argv[1]).iterdir():
    try:
        read_state(folder)
    except ValueError as error:
        refused += ".metadata" in str(error)
print(refused, "refused")
"""


def test_the_exploit_would_run(tmp_path: Path) -> None:
    """The tables are good pickles: a reader that looks names up runs them."""
    for kind in ("by name", "by an old name", "by an instance", "by an object"):
        ran = tmp_path / kind.replace(" ", "-")
        pickle.loads(b"\x80\x04" + hostile(ran)[kind] + b".")
        assert ran.exists(), kind


BOMBS = {
    "a note of a note's place": word("a") + b"r" + struct.pack("<I", 2**32 - 1),
    "a key in many boxes": b"}" + b")" + b"\x85" * 200_000 + b"Ns",
    "a list of itself": b"]\x94h\x00a",
    "twice a list, forty times": b"]\x94"
    + b"".join(b"](h" + bytes([k]) + b"h" + bytes([k]) + b"e\x94" for k in range(40)),
    "bytes that are not there": b"\x8d" + struct.pack("<Q", 2**62),
    "a number of many digits": b"\x8b" + struct.pack("<i", 2**30),
    "nothing at all": b"",
    "more ends than beginnings": b"t",
    "two values": b"NN",
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_table_that_means_to_kill(kind: str, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "checkpoint", BOMBS[kind])
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"optimizer_0/\.metadata"):
        load_from_optimizer(small(), folder)
    assert time.monotonic() - began < 30


# Tables as torch writes them


def saved(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Train a little, and save the optimizer as torch does."""
    model = small().to(dtype)
    optimizer = adam(model.parameters())
    for step in range(2):
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step)).to(dtype)
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is one process
        held = get_optimizer_state_dict(model, optimizer)
        dcp.save({"optimizer": held}, checkpoint_id=folder / "optimizer_0")
    return model, optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_shards_hold_what_the_optimizer_does(dtype: torch.dtype, tmp_path: Path) -> None:
    model, optimizer = saved(tmp_path, dtype)
    found = read_optimizer(model, tmp_path)
    own = dict(model.named_parameters())
    for name, entry in found.entries.items():
        kept = optimizer.state[own[name]]
        torch.testing.assert_close(entry.second, kept["exp_avg_sq"].to(entry.second.dtype), rtol=0, atol=0)
        torch.testing.assert_close(entry.first, kept["exp_avg"].to(entry.second.dtype), rtol=0, atol=0)
        assert entry.step == 2
    assert set(found.rates.values()) == {1e-2}


class Table:
    """A table of contents, changed before it is read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "optimizer_0"
        self.table = dcp.FileSystemReader(self.folder).read_metadata()

    def write(self) -> None:
        (self.folder / ".metadata").write_bytes(pickle.dumps(self.table))


def elsewhere(table: Any) -> None:
    for info in table.storage_data.values():
        info.relative_path = "../secret"


def absolute(table: Any) -> None:
    for info in table.storage_data.values():
        info.relative_path = "/dev/zero"


def behind(table: Any) -> None:
    next(iter(table.storage_data.values())).length = 10**9


def vast(table: Any) -> None:
    table.state_dict_metadata["optimizer.state.0.weight.exp_avg"].size = torch.Size([10**6, 10**6])


def short(table: Any) -> None:
    gone = next(index for index in table.storage_data if index.fqn == "optimizer.state.0.weight.exp_avg")
    del table.storage_data[gone]


def moved(table: Any) -> None:
    index = next(index for index in table.storage_data if index.fqn == "optimizer.state.0.weight.exp_avg")
    object.__setattr__(index, "offset", torch.Size([1, 0]))


def swapped(table: Any) -> None:
    one, other = (
        next(i for i in table.storage_data if i.fqn == f"optimizer.state.0.{n}.exp_avg") for n in ("weight", "bias")
    )
    data = table.storage_data
    data[one], data[other] = data[other], data[one]


def sparse(table: Any) -> None:
    table.state_dict_metadata["optimizer.state.0.weight.exp_avg"].properties.layout = torch.sparse_coo


def compressed(table: Any) -> None:
    next(iter(table.storage_data.values())).transform_descriptors = ["stream.zstd/1"]


def deep(table: Any) -> None:
    table.planner_data[next(iter(table.planner_data))] = ("param_groups", *range(100_000))


WRONG = {
    elsewhere: "'../secret' does not lie in the folder itself",
    absolute: "'/dev/zero' does not lie in the folder itself",
    behind: "ends behind the end of __0_0.distcp",
    vast: "its tensors have 4,000,000,000,",
    short: "lack 15 of 15 entries of 'optimizer.state.0.weight.exp_avg'",
    moved: "ends behind its",
    swapped: "has no part of 'optimizer.state.0.weight.exp_avg'",
    sparse: "is not dense",
    compressed: "is compressed",
    deep: "the path a tuple is none",
}


@pytest.mark.parametrize("change", WRONG, ids=lambda change: change.__name__)
def test_tables_that_say_what_is_not_so(change: Callable[[Any], None], tmp_path: Path) -> None:
    model, _ = saved(tmp_path)
    (tmp_path / "secret").write_text("secret")
    made = Table(tmp_path)
    change(made.table)
    made.write()
    with pytest.raises(ValueError, match="optimizer_0") as refusal:
        load_from_optimizer(model, tmp_path)
    assert WRONG[change] in str(refusal.value)


def test_damaged_tables_and_parts_are_refused_or_read(tmp_path: Path) -> None:
    """Bytes that changed: an answer, or a refusal that names the file; torch keeps no checksum that says which."""
    saved(tmp_path)
    draw, folder = random.Random(0), tmp_path / "optimizer_0"
    for name, count in ((".metadata", 150), ("__0_0.distcp", 30)):
        whole = (folder / name).read_bytes()
        for _ in range(count):
            broken, at = bytearray(whole), draw.randrange(len(whole))
            if draw.random() < 0.3:
                broken = broken[:at]
            else:
                broken[at : at + draw.choice((1, 1, 16))] = bytes(draw.choice((1, 1, 16)))
            (folder / name).write_bytes(broken)
            try:
                read_state(tmp_path)
            except ValueError as error:
                assert "optimizer_0" in str(error)  # noqa: PT017
        (folder / name).write_bytes(whole)
    read_state(tmp_path)


def stolen(tmp_path: Path) -> Path:
    return checkpoint(tmp_path / "checkpoint", hostile(tmp_path / "ran")["the import helper"])


DOORS: dict[str, Callable[[Path, Path], list[Any]]] = {
    "build --optimizer": lambda at, run: ["build", run, *rows(), "--optimizer", at],
    "hessian --optimizer": lambda at, run: ["hessian", run, *rows(), "--optimizer", at],
    "tracin": lambda at, run: ["tracin", run, *rows(), *queries(), "--checkpoints", at],
    "less": lambda at, run: ["less", run, *rows(), *queries(), "--checkpoints", at],
}


def rows() -> list[Any]:
    return ["--model", world() / "model", "--dataset", world() / "corpus.jsonl"]


def queries() -> list[Any]:
    return ["--query.dataset", world() / "questions.jsonl"]


@pytest.mark.parametrize("door", DOORS)
def test_every_door_to_a_checkpoint(door: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    at = stolen(tmp_path)
    assert main([str(word) for word in DOORS[door](at, tmp_path / "run")]) == 1
    said = capsys.readouterr().err
    assert "optimizer_0/.metadata" in said
    assert "unexpected" not in said
    assert not (tmp_path / "ran").exists()


def test_an_index_whose_transform_names_a_checkpoint(
    lying: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    at = stolen(tmp_path)
    index = lying(transform=TransformConfig(projection_dim=4, optimizer=str(at)))
    assert main(["query", str(index), "--text", "where does babo live ?"]) == 1
    said = capsys.readouterr().err
    assert "optimizer_0/.metadata" in said
    assert not (tmp_path / "ran").exists()


@functools.cache
def honest(per_token: str | None = None) -> Path:
    """Return an index of the corpus, made once."""
    run = Path(tempfile.mkdtemp(prefix="influence-honest-")) / "index"
    atexit.register(shutil.rmtree, run.parent, ignore_errors=True)
    build.run(build_config(run, per_token=per_token))
    return run


@pytest.fixture
def lying(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Return what makes indexes whose root says another configuration than they were built by, as a stranger's may."""
    told: dict[Path, dict[str, Any]] = {}
    true = reading.read_root

    def read_root(directory: Any, *more: Any) -> Any:
        about, says = true(directory, *more), dict(told.get(Path(directory), {}))
        appended = says.pop("appended", about.appended)
        config = about.config | {name: to_mapping(value) for name, value in says.items()}
        return about._replace(config=config, appended=appended)

    def make(per_token: str | None = None, **says: Any) -> Path:
        run = tmp_path / f"index{len(told)}"
        shutil.copytree(honest(per_token), run)
        told[run] = says
        return run

    monkeypatch.setattr(reading, "read_root", read_root)
    return make


# An index is data


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a stranger's code leaves behind: a module beside the user, and a model that brings its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    place = tmp_path / "ran"
    (tmp_path / "stranger.py").write_text(
        f"import pathlib\npathlib.Path({str(place)!r}).touch()\n"
        "def loss(output, batch):\n    return output.logits.float().pow(2).mean((1, 2)).to(output.logits.dtype)\n"
    )
    monkeypatch.delitem(sys.modules, "stranger", raising=False)
    folder = tmp_path / "own"
    shutil.copytree(world() / "model", folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(
        f"import pathlib\npathlib.Path({str(place)!r}).touch()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class Config(LlamaConfig):\n    model_type = 'own'\n"
        "class Model(LlamaForCausalLM):\n    config_class = Config\n"
    )
    return place


def asked(capsys: pytest.CaptureFixture[str], *words: Any) -> tuple[int, str]:
    """Return a command's exit status and all that it said."""
    capsys.readouterr()
    status = main([str(word) for word in words])
    said = capsys.readouterr()
    return status, said.out + said.err


TEXT = ("--text", "where does babo live ?")


def test_a_query_imports_no_loss_that_nobody_typed(
    ran: Path, lying: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = lying(loss=LossConfig("stranger:loss"))
    gold = tmp_path / "gold.jsonl"
    gold.write_text("".join(json.dumps({"gold": [0]}) + "\n" for _ in lines("questions.jsonl")))
    recall = ["recall", index, "--gold", gold, "--dataset", world() / "questions.jsonl"]
    for command in (["query", index, *TEXT], recall):
        status, said = asked(capsys, *command)
        assert status == 1
        assert "type --loss stranger:loss;" in said
        assert "the module stranger would be imported" in said
        assert str(index) in said
        assert not ran.exists()
    status, said = asked(capsys, "query", index, *TEXT, "--loss", "cross_entropy")
    assert (status, ran.exists()) == (0, False)
    assert "the query measures cross_entropy, and the rows of" in said
    status, said = asked(capsys, "query", index, *TEXT, "--loss", "stranger:loss")
    assert (status, ran.exists()) == (0, True), said
    assert "the query measures" not in said


def test_a_loss_that_is_no_name_is_not_repeated_as_something_to_type(
    ran: Path, lying: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = "stranger:loss; touch ran \x1b[2J"
    index = lying(loss=LossConfig(evil))
    status, said = asked(capsys, "query", index, *TEXT)
    assert (status, ran.exists()) == (1, False)
    assert "which is no loss" in said
    assert "type --loss stranger" not in said
    assert "\x1b" not in said


def test_a_query_runs_no_code_of_a_model_that_nobody_trusted(
    ran: Path, lying: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = lying(model=ModelConfig(str(tmp_path / "own"), trust_remote_code=True))
    status, said = asked(capsys, "query", index, *TEXT)
    assert (status, ran.exists()) == (1, False)
    assert "type --trust-remote-code" in said
    assert str(tmp_path / "own") in said
    assert asked(capsys, "query", index, *TEXT, "--model", world() / "model")[0] == 0
    assert not ran.exists()
    assert asked(capsys, "explore", index)[0] == 0
    assert not ran.exists()
    status, said = asked(capsys, "query", index, *TEXT, "--trust-remote-code", "--force")
    assert (status, ran.exists()) == (0, True), said  # by force, because a model of one's own is another function


def test_explore_runs_no_code_of_a_tokenizer_that_nobody_trusted(
    ran: Path, lying: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where every token has a row, texts need the tokenizer."""
    told = json.loads((tmp_path / "own" / "tokenizer_config.json").read_text())
    told |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Tokenizer", "own.Tokenizer"]}}
    (tmp_path / "own" / "tokenizer_config.json").write_text(json.dumps(told))
    with open(tmp_path / "own" / "own.py", "a") as file:
        file.write(
            "from transformers import PreTrainedTokenizerFast\nclass Tokenizer(PreTrainedTokenizerFast):\n    pass\n"
        )
    model = ModelConfig(str(tmp_path / "own"), trust_remote_code=True)
    index = lying("loss", model=model)
    status, said = asked(capsys, "explore", index)
    assert (status, ran.exists()) == (1, False)
    assert "--trust-remote-code" in said
    assert str(tmp_path / "own") in said
    assert asked(capsys, "explore", index, "--trust-remote-code")[0] == 0
    assert ran.exists()


def test_a_finished_run_of_chains_runs_no_code(ran: Path, tmp_path: Path) -> None:
    """Its tokenizer says what its tokens are."""
    told = json.loads((tmp_path / "own" / "tokenizer_config.json").read_text())
    told |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Tokenizer", "own.Tokenizer"]}}
    (tmp_path / "own" / "tokenizer_config.json").write_text(json.dumps(told))
    run = tmp_path / "chains"
    run.mkdir()
    config = to_mapping(Sampling(str(run), ModelConfig(str(tmp_path / "own"), trust_remote_code=True)))
    write_manifest(run, manifest_of("bif", config, [], {}, {}, []))
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        tokenizer_of(Sampling(str(run)))
    assert not ran.exists()


RECORDED: dict[str, tuple[dict[str, Any], str]] = {
    "trust in the model's settings": (
        {"model": {"model_kwargs": "{trust_remote_code: true}"}},
        "'trust_remote_code' is not taken from an index",
    ),
    "weights that are pickles": ({"model": {"model_kwargs": "{weights_only: false}"}}, "'weights_only' is not taken"),
    "kernels of anybody's": ({"model": {"model_kwargs": "{allow_all_kernels: true}"}}, "'allow_all_kernels' is not"),
    "a kernel as attention": (
        {"model": {"model_kwargs": "{attn_implementation: stranger/kernel}"}},
        "'attn_implementation' is not taken",
    ),
    "a module as Megatron": (
        {"model": {"peft_init_kwargs": "{r: 2, megatron_config: {a: 1}, megatron_core: stranger}"}},
        "'megatron_config', which is not taken from an index",
    ),
    "pickles as a dataset": ({"data": {"dataset": "pandas"}}, "reads its dataset with 'pandas'"),
    "a catalogue as a dataset": ({"data": {"dataset": "iceberg"}}, "reads its dataset with 'iceberg'"),
    "a place to write to": ({"data": {"data_kwargs": "{cache_dir: /home}"}}, "with 'cache_dir'"),
    "an appended dataset": ({"appended": {"data_kwargs": "{cache_dir: /home}"}}, "with 'cache_dir'"),
}


@pytest.mark.parametrize("kind", RECORDED)
def test_settings_that_lead_to_code_are_not_taken_from_an_index(
    kind: str, ran: Path, lying: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    groups, match = RECORDED[kind]
    says: dict[str, Any] = {}
    if "model" in groups:
        says["model"] = ModelConfig(str(tmp_path / "own"), **groups["model"])
    if "data" in groups:
        says["data"] = replace(corpus(), **groups["data"])
    if "appended" in groups:
        stored = to_mapping(replace(corpus(), **groups["appended"]))
        says["appended"] = ({"first": 0, "config": {"data": stored}, "command": [], "recorded": {}},)
    index = lying(**says)
    status, said = asked(capsys, "query", index, *TEXT)
    assert (status, ran.exists()) == (1, False), said
    assert match in said
    assert str(index) in said


def test_settings_that_lead_to_no_code_are_taken(
    lying: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    model = replace(model_config(), model_kwargs="{attn_implementation: eager, dtype: float64}")
    data = replace(corpus(), data_kwargs="{encoding: utf-8}")
    index = lying(model=model, data=data)
    assert asked(capsys, "query", index, *TEXT)[0] == 0
    index = lying(model=replace(model, model_kwargs="{num_labels: 3}"))
    status, said = asked(capsys, "query", index, *TEXT)
    assert status == 1
    assert "type --model-kwargs '{num_labels: 3}'" in said
    assert asked(capsys, "query", index, *TEXT, "--model-kwargs", "{num_labels: 3}")[0] == 0


@pytest.mark.parametrize("name", ["trust_remote_code", "weights_only", "allow_all_kernels"])
def test_there_is_one_way_to_ask_for_a_models_code(name: str, ran: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"model_kwargs has '{name}'.*pass trust_remote_code=True"):
        models.load(tmp_path / "own", model_kwargs={name: name != "weights_only"})
    assert not ran.exists()


def test_pickles_are_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="reads pickles"):
        data.load("pandas", data_kwargs={"data_files": str(tmp_path / "rows.pkl")})


def test_an_adapter_imports_no_module(ran: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="megatron_config, for which PEFT imports the module"):
        models.load(
            world() / "model",
            peft_init_kwargs={
                "r": 2,
                "target_modules": ["q_proj"],
                "megatron_config": {"a": 1},
                "megatron_core": "stranger",
            },
        )
    assert not ran.exists()


# What the project says of it


ROOT = Path(__file__).parent.parent
SITES = {
    "torch.load": {"train/contents.py"},
    "import_module": {
        "__init__.py",
        "cli.py",
        "models/quantised.py",
        "pipelines/chains/posterior.py",
        "pipelines/frame/prepare.py",
    },
    "getattr of a library": {"index/columns.py", "models/load.py", "train/epochs.py"},
    "load_dataset": {"data/sources.py"},
    "load_from_disk": {"data/sources.py"},
    "safe_load": {"data/parsing.py"},
    "render_jinja_template": {"data/chat.py"},
    "from_string": {"data/templates.py"},
    "read_index": {"index/faiss_search.py"},
    "from_pretrained": {"models/load.py", "pipelines/frame/loading.py", "pipelines/frame/texts.py"},
}
"""Where files, or names from files, may lead to code; each is a line of docs/trust.md. Nothing else may be added."""
PICKLES = {"pickle", "numpy", "np", "marshal", "joblib", "dill", "shelve"}
BARE = {"eval", "exec", "compile", "__import__"}
NEVER = BARE | {"Unpickler", "_Unpickler", "loads of pickle", "unsafe_load", "full_load"}
MODULES = {"torch", "transformers", "datasets", "numpy", "faiss", "peft", "builtins", "os", "importlib", "sys"}


def sites(source: str) -> set[str]:
    """Return what of the above a module calls."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        owner = node.func.value if isinstance(node.func, ast.Attribute) else None
        room = owner.id if isinstance(owner, ast.Name) else ""
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in ("load", "loads") and room in PICKLES | {"torch"}:
            found.add("torch.load" if room == "torch" else "loads of pickle")
        elif name == "getattr":
            first, second = node.args[0], node.args[1]
            if isinstance(first, ast.Name) and first.id in MODULES and not isinstance(second, ast.Constant):
                found.add("getattr of a library")
        elif name in BARE:
            found |= {name} if owner is None else set()
        elif name in SITES or name in NEVER or (room == "yaml" and name == "load"):
            found.add(name)
    return found


def test_code_is_reached_from_nowhere_else() -> None:
    where: dict[str, set[str]] = {}
    for path in (ROOT / "influence").rglob("*.py"):
        for name in sites(path.read_text()):
            where.setdefault(name, set()).add(path.relative_to(ROOT / "influence").as_posix())
    assert not NEVER & where.keys(), {name: where[name] for name in NEVER & where.keys()}
    new = {name: places - SITES.get(name, set()) for name, places in where.items() if places - SITES.get(name, set())}
    assert not new, f"say in docs/trust.md why these are safe: {new}"
    assert "weights_only=True" in (ROOT / "influence/train/contents.py").read_text()


def test_a_new_site_would_be_found() -> None:
    for line, name in (
        ("import pickle\npickle.loads(b'')", "loads of pickle"),
        ("import torch\ngetattr(torch, name)", "getattr of a library"),
        ("eval('1')", "eval"),
        ("import numpy as np\nnp.load('x')", "loads of pickle"),
        ("class A(pickle.Unpickler): pass\npickle.Unpickler(file)", "Unpickler"),
        ("yaml.load(text)", "load"),
    ):
        assert name in sites(line), line


def test_what_is_said_to_type_can_be_typed() -> None:
    text = (ROOT / "SECURITY.md").read_text() + (ROOT / "docs" / "trust.md").read_text()
    flags = {flag for command in COMMANDS for flag in names_of(_kind(command)[1]).values()}
    flags |= {"--config"}
    for flag in re.findall(r"(?<![\w-])--[a-z][a-z.-]+", text):
        assert flag in flags or any(known.endswith(f".{flag.removeprefix('--')}") for known in flags), flag
    named = re.findall(r"`influence ([a-z]+)", text)
    assert {"inspect", "tracin", "less"} <= {*named} <= {*COMMANDS}
    for command in ("export", "explore", "query", "recall", "score", "llc", "bif", "susceptibilities"):
        assert f"`{command}" in text
        assert command in COMMANDS
    for module in re.findall(r"`(influence(?:\.\w+)+)`", text):
        assert pkgutil.resolve_name(module)
    assert f"{sizes.LARGEST_ROW >> 20} MiB; {sizes.DEEPEST} brackets" in text
    assert f"{child.LIMITS.seconds:g} s of a processor, {child.LIMITS.memory >> 30} GiB" in text
    assert f"{parsing.LARGEST >> 20} MiB, {parsing.VALUES:,} values" in text
    assert f"{contents.LARGEST >> 20} MiB; its tensors" in text
