"""A fingerprint says which function, not only which weights: changes of what no weight holds, at every door.

Both sides of every case have the same parameters. What is refused is refused when an index is asked and when a run is
resumed, by name and with both values; what is the same function is accepted at both.
"""

import copy
import enum
import functools
import json
import os
import subprocess
import sys
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from influence import Attributor, as_blocks, build, chain, functionalize, hessians, per_example_grads, project, sgmcmc
from influence.func.loss.described import described
from influence.func.loss.functionalize import make_skeleton
from influence.func.loss.trial import KEPT, apart, tried
from influence.index import Fingerprint, FingerprintError, fingerprint_of, open_index, provenance, start
from influence.index.columns import choose
from influence.index.matching import matched
from influence.index.provenance import trials_apart
from influence.store import BadFileError
from tests.cases import CASES

IDS = {"vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZES = {**IDS, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = {**SIZES, "num_key_value_heads": 2, "max_position_embeddings": 32}
GPT2 = {**IDS, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 32}
TOKENS = {"input_ids": (torch.arange(24) * 5 % 40).reshape(4, 6)}
POINTS = (torch.linspace(-1, 1, 16).reshape(4, 4), torch.tensor([0, 2, 1, 2]))


@functools.cache
def _weights(architecture: str, sizes: tuple[tuple[str, Any], ...]) -> dict[str, Tensor]:
    return dict(_fresh(architecture, dict(sizes)).state_dict())


def _fresh(architecture: str, settings: dict[str, Any]) -> nn.Module:
    config = {"ForCausalLM": "Config", "LMHeadModel": "Config", "ForSequenceClassification": "Config"}
    name = next(architecture.removesuffix(end) + new for end, new in config.items() if architecture.endswith(end))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return getattr(transformers, architecture)(getattr(transformers, name)(**settings)).eval()


def hf(architecture: str, sizes: dict[str, Any], **settings: Any) -> nn.Module:
    """Return a model whose weights are the same whatever the settings."""
    model = _fresh(architecture, {**sizes, **settings})
    model.load_state_dict(_weights(architecture, tuple(sizes.items())))
    return model


llama = functools.partial(hf, "LlamaForCausalLM", LLAMA)
gpt2 = functools.partial(hf, "GPT2LMHeadModel", GPT2)
gemma = functools.partial(hf, "Gemma2ForCausalLM", {**LLAMA, "head_dim": 8})


class Net(nn.Module):
    """A model of one's own: what it multiplies by is no parameter."""

    def __init__(self, scale: float = 1.0, act: Any = torch.tanh, hidden: float = 1.0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layers = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3))
        self.scale, self.act, self._hidden = scale, act, hidden

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[2](self.act(self.layers[1](self.layers[0](x)) * self._hidden)) * self.scale


def net(*middle: nn.Module) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ends = nn.Linear(4, 8), nn.Linear(8, 3)
    return nn.Sequential(ends[0], *middle, ends[1]).eval()


class Side(NamedTuple):
    loss_fn: Any
    params: Any
    batch: Any


def of(model: nn.Module, batch: Any = None, **settings: Any) -> Side:
    words = hasattr(model, "config")
    batch = batch if batch is not None else TOKENS if words else POINTS
    targets = ["*0*q_proj*weight", "*h.0.attn.c_attn.weight"]["transformer" in dict(model.named_children())]
    return Side(*functionalize(model, targets=targets if words else None, **settings), batch)


def patched(model: nn.Module, path: str, **attributes: Any) -> nn.Module:
    for name, value in attributes.items():
        setattr(model.get_submodule(path), name, value)
    return model


def wrapped(model: nn.Module, factor: float) -> nn.Module:
    """A forward that was put on a module: its constant is in a closure."""
    before = model.forward

    def forward(self: nn.Module, *inputs: Any, **named: Any) -> Any:
        found = before(*inputs, **named)
        return found * factor if isinstance(found, Tensor) else type(found)(logits=found.logits * factor)

    model.forward = types.MethodType(forward, model)  # type: ignore[method-assign]
    return model


def moved(model: nn.Module, name: str) -> nn.Module:
    """A buffer that was edited."""
    found = dict(model.named_buffers())[name]
    found.view(-1)[0] += 0.5
    return model


def margin(constant: float) -> Callable[[Any, Any], Tensor]:
    """A loss of the user's, whose source was edited: its name stays."""

    def loss(output: Any, batch: Any) -> Tensor:
        logits = output if isinstance(output, Tensor) else output.logits[:, -1]
        return logits.square().mean(-1) + constant * logits[:, 0]

    return loss


def plain(constant: float) -> Side:
    return Side(lambda p, x: (x @ p["w"] - constant).square(), {"w": torch.arange(4.0)}, POINTS[0])


class Huber:
    """A loss that is an object: its settings are in it."""

    def __init__(self, delta: float) -> None:
        self.delta = delta

    def __call__(self, params: Any, x: Any) -> Tensor:
        return F.huber_loss(x @ params["w"], torch.ones(len(x)), reduction="none", delta=self.delta)


def lora(alpha: int, disabled: bool = False) -> nn.Module:
    import peft

    settings = peft.LoraConfig(r=2, lora_alpha=alpha, target_modules=["q_proj"], task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        adapted: Any = peft.get_peft_model(llama(), settings)
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(p, std=10.0)
    if disabled:
        adapted.base_model.disable_adapter_layers()
    return adapted


def classifier(**settings: Any) -> Side:
    model = hf("GPT2ForSequenceClassification", {**GPT2, "num_labels": 3}, **settings)
    return of(model, {**TOKENS, "labels": torch.tensor([0, 1, 2, 1])})


def other_reference() -> nn.Module:
    model = llama()
    with torch.no_grad():
        next(model.parameters()).mul_(1.1)
    return model


def kl(reference: nn.Module) -> Side:
    return of(gemma_like(), loss="kl", reference=reference)


def gemma_like() -> nn.Module:
    return llama(rms_norm_eps=1e-3)


# what was stored, what comes later, the field that says so, and what of both values the message shows
Case = tuple[Callable[[], Side], Callable[[], Side], str, str, str]
REFUSED: dict[str, Case] = {
    "rms_norm_eps": (
        lambda: of(llama()),
        lambda: of(llama(rms_norm_eps=1e-4)),
        *("function", "config.rms_norm_eps: 1e-06", "config.rms_norm_eps: 0.0001"),
    ),
    "hidden_act": (
        lambda: of(llama()),
        lambda: of(llama(hidden_act="gelu")),
        *("function", "config.hidden_act: 'silu'", "config.hidden_act: 'gelu'"),
    ),
    "rope theta, which a buffer holds too": (
        lambda: of(llama()),
        lambda: of(llama(rope_parameters={"rope_type": "default", "rope_theta": 500.0})),
        *("function", "rope_theta: 10000.0", "rope_theta: 500.0"),
    ),
    "layer_norm_epsilon": (
        lambda: of(gpt2()),
        lambda: of(gpt2(layer_norm_epsilon=1e-3)),
        *("function", "config.layer_norm_epsilon: 1e-05", "config.layer_norm_epsilon: 0.001"),
    ),
    "activation_function": (
        lambda: of(gpt2()),
        lambda: of(gpt2(activation_function="relu")),
        *("function", "config.activation_function: 'gelu_new'", "config.activation_function: 'relu'"),
    ),
    "attention scaled by layer": (
        lambda: of(gpt2()),
        lambda: of(gpt2(scale_attn_by_inverse_layer_idx=True)),
        *("function", "config.scale_attn_by_inverse_layer_idx: None", "config.scale_attn_by_inverse_layer_idx: True"),
    ),
    "attention scale, on one layer alone": (
        lambda: of(llama()),
        lambda: of(patched(llama(), "model.layers.1.self_attn", scaling=0.6)),
        *("function", "self_attn.scaling: 0.5", r"self_attn.scaling: \[0.5, 0.6\]"),
    ),
    "query_pre_attn_scalar": (
        lambda: of(gemma()),
        lambda: of(gemma(query_pre_attn_scalar=64)),
        *("function", "config.query_pre_attn_scalar: 256", "config.query_pre_attn_scalar: 64"),
    ),
    "cap of the logits": (
        lambda: of(gemma()),
        lambda: of(gemma(final_logit_softcapping=5.0)),
        *("function", "config.final_logit_softcapping: 30.0", "config.final_logit_softcapping: 5.0"),
    ),
    "cap of the attention": (
        lambda: of(gemma()),
        lambda: of(gemma(attn_logit_softcapping=None)),
        *("function", "config.attn_logit_softcapping: 50.0", "config.attn_logit_softcapping: None"),
    ),
    "scale of the logits": (
        lambda: of(hf("CohereForCausalLM", LLAMA)),
        lambda: of(hf("CohereForCausalLM", LLAMA, logit_scale=0.5)),
        *("function", "config.logit_scale: 0.0625", "config.logit_scale: 0.5"),
    ),
    "which token a classifier takes for padding": (
        lambda: classifier(),
        lambda: classifier(pad_token_id=5),
        *("function", "config.pad_token_id: 0", "config.pad_token_id: 5"),
    ),
    "scale of an adapter": (
        lambda: of(lora(4)),
        lambda: of(lora(8)),
        *("function", r"q_proj.lora_alpha: \{default: 4\}", r"q_proj.lora_alpha: \{default: 8\}"),
    ),
    "adapters switched off": (
        lambda: of(lora(4)),
        lambda: of(lora(4, disabled=True)),
        *("function", "outputs of a trial: ", "outputs of a trial: "),
    ),
    "a running mean": (
        lambda: of(net(nn.BatchNorm1d(8))),
        lambda: of(moved(net(nn.BatchNorm1d(8)), "1.running_mean")),
        *("weights", "", ""),
    ),
    "a scale of one's own module": (
        lambda: of(Net()),
        lambda: of(Net(scale=2.0)),
        *("function", "scale: 1.0", "scale: 2.0"),
    ),
    "a function that is an attribute": (
        lambda: of(Net()),
        lambda: of(Net(act=F.relu)),
        *("function", "act: .*tanh", "act: .*relu"),
    ),
    "what no attribute tells: a private number": (
        lambda: of(Net()),
        lambda: of(Net(hidden=1.1)),
        *("function", "outputs of a trial: ", "outputs of a trial: "),
    ),
    "what no attribute tells: a forward that was replaced": (
        lambda: of(wrapped(llama(), 1.0)),
        lambda: of(wrapped(llama(), 1.1)),
        *("function", "outputs of a trial: ", "outputs of a trial: "),
    ),
    "GELU's approximation": (
        lambda: of(net(nn.GELU())),
        lambda: of(net(nn.GELU(approximate="tanh"))),
        *("function", "approximate: 'none'", "approximate: 'tanh'"),
    ),
    "epsilon of a LayerNorm": (
        lambda: of(net(nn.LayerNorm(8))),
        lambda: of(net(nn.LayerNorm(8, eps=1e-4))),
        *("function", "eps: 1e-05", "eps: 0.0001"),
    ),
    "which of two norms has the other epsilon": (
        lambda: of(net(nn.LayerNorm(8, eps=1e-4), nn.Tanh(), nn.LayerNorm(8))),
        lambda: of(net(nn.LayerNorm(8), nn.Tanh(), nn.LayerNorm(8, eps=1e-4))),
        *("function", r"eps: \[0.0001, 1e-05\]", r"eps: \[1e-05, 0.0001\]"),
    ),
    "the order of layers without weights": (
        lambda: of(net(nn.Tanh(), nn.Softplus())),
        lambda: of(net(nn.Softplus(), nn.Tanh())),
        *("function", "'Tanh', 'Softplus'", "'Softplus', 'Tanh'"),
    ),
    "weights of a KL's reference": (
        lambda: kl(llama()),
        lambda: kl(other_reference()),
        *("reference", "weights: ", "weights: "),
    ),
    "config of a KL's reference": (
        lambda: kl(llama()),
        lambda: kl(llama(hidden_act="gelu")),
        *("reference", "config.hidden_act: 'silu'", "config.hidden_act: 'gelu'"),
    ),
    "a constant of the user's loss": (
        lambda: of(llama(), loss=margin(1.0)),
        lambda: of(llama(), loss=margin(1.1)),
        *("loss", "losses of a trial: ", "losses of a trial: "),
    ),
    "a constant of the user's loss of a plain module": (
        lambda: of(Net(), loss=margin(1.0)),
        lambda: of(Net(), loss=margin(1.1)),
        *("loss", "losses of a trial: ", "losses of a trial: "),
    ),
    "a lambda": (
        lambda: plain(1.0),
        lambda: plain(1.01),
        *("loss", "losses of a trial: ", "losses of a trial: "),
    ),
    "a setting of a loss that is an object": (
        lambda: plain(1.0)._replace(loss_fn=Huber(1.0)),
        lambda: plain(1.0)._replace(loss_fn=Huber(2.0)),
        *("loss", "losses of a trial: ", "losses of a trial: "),
    ),
    "a loss that takes other batches": (
        lambda: plain(1.0)._replace(loss_fn=lambda p, x: (x["x"] @ p["w"]).square(), batch={"x": POINTS[0]}),
        lambda: plain(1.0)._replace(loss_fn=lambda p, x: (x["y"] @ p["w"]).square(), batch={"y": POINTS[0]}),
        *("loss", "one that does not", "one that fails on the other's trial"),
    ),
}
# a query may measure another loss, and says so by its name or settings; a run that is resumed may not
DECLARED: dict[str, Case] = {
    "label smoothing": (
        lambda: of(llama()),
        lambda: of(llama(), label_smoothing=0.1),
        *("loss_settings", "label_smoothing: 0.0", "label_smoothing: 0.1"),
    ),
    "reduction": (lambda: of(llama()), lambda: of(llama(), reduction="mean"), *("loss_settings", "sum", "mean")),
    "another loss of ours": (lambda: of(llama()), lambda: of(llama(), loss="log_odds"), *("loss", "cross", "log_odds")),
    "a loss by another name": (lambda: of(llama()), lambda: of(llama(), loss=margin(1.0)), *("loss", "cross", "marg")),
    "another plain loss by another name": (
        lambda: plain(1.0),
        lambda: plain(1.0)._replace(loss_fn=named),
        *("loss", "lambda", "named"),
    ),
}


def named(params: Any, x: Any) -> Tensor:
    return (x @ params["w"]).abs()


def saved(model: nn.Module, place: Path) -> nn.Module:
    model.save_pretrained(place)  # type: ignore[operator]
    return type(model).from_pretrained(place).eval()  # type: ignore[attr-defined, no-any-return]


class Kind(enum.Enum):
    POST = "post"
    PRE = "pre"


@dataclass
class Settings:
    width: int = 8
    act: str = "tanh"
    device: str = "cpu"
    dtype: torch.dtype = torch.float32


class Told(Net):
    """Attributes of every kind, of which some differ from process to process and some are no settings."""

    def __init__(self, where: str = "/one/place") -> None:
        super().__init__(act=lambda x: x.tanh())
        self.cfg, self.kind, self.number = Settings(), Kind.PRE, numpy.float32(0.5)
        self.smooth = functools.partial(F.gelu, approximate="tanh")
        self.names, self.cache_dir, self.checkpoint = {"b", "a", "c"}, where, where
        self.method, self.seen, self.stream = self.number.item, torch.rand(3), object()
        self._last = object()


# the same function by another way
ACCEPTED: dict[str, tuple[Callable[[Path], Side], Callable[[Path], Side]]] = {
    "saved and loaded again": (lambda at: of(llama()), lambda at: of(saved(llama(), at / "a"))),
    "a folder that was moved": (
        lambda at: of(saved(gpt2(), at / "a")),
        lambda at: of(saved(saved(gpt2(), at / "a"), at / "b")),
    ),
    "Gemma saved and loaded again": (lambda at: of(gemma()), lambda at: of(saved(gemma(), at / "a"))),
    "another attention kernel": (
        lambda at: of(llama(attn_implementation="sdpa")),
        lambda at: of(llama(attn_implementation="eager")),
    ),
    "another attention kernel in bfloat16": (
        lambda at: of(llama(attn_implementation="sdpa").bfloat16()),
        lambda at: of(llama(attn_implementation="eager").bfloat16()),
    ),
    "a model in train mode": (lambda at: of(gpt2()), lambda at: of(gpt2().train())),
    "dropout, which is inactive": (
        lambda at: of(net(nn.Dropout(0.1))),
        lambda at: of(net(nn.Dropout(0.5))),
    ),
    "dropout of a config": (lambda at: of(gpt2()), lambda at: of(gpt2(attn_pdrop=0.5, resid_pdrop=0.0))),
    "checkpointing, caching, what is returned": (
        lambda at: of(llama()),
        lambda at: of(checkpointing(llama(use_cache=False, output_attentions=False))),
    ),
    "which token a generator pads with": (lambda at: of(llama()), lambda at: of(padding(llama()))),
    "names of labels": (lambda at: of(llama()), lambda at: of(llama(id2label={0: "no", 1: "yes"}))),
    "parameters that train": (lambda at: of(llama()), lambda at: of(llama().requires_grad_(False))),
    "another batch of it": (lambda at: of(Net()), lambda at: of(Net(), (POINTS[0][:2] * 2, POINTS[1][:2]))),
    "another batch of the user's loss": (
        lambda at: of(llama(), loss=margin(1.0)),
        lambda at: of(llama(), {"input_ids": TOKENS["input_ids"][:1, :3]}, loss=margin(1.0)),
    ),
    "another lambda of the same numbers": (lambda at: plain(1.0), lambda at: plain(0.5 + 0.5)),
    "rounding": (lambda at: plain(1.0), lambda at: plain(1.0 + 1e-6)),
    "paths and what is remembered": (lambda at: of(Told("/one")), lambda at: of(Told("/two"))),
    "a model that ran before": (lambda at: of(llama()), lambda at: of(ran(llama()))),
    "an adapter saved and loaded again": (lambda at: of(lora(4)), lambda at: of(saved_adapter(at))),
}


def checkpointing(model: nn.Module) -> nn.Module:
    for part in model.modules():
        if hasattr(part, "gradient_checkpointing"):
            part.gradient_checkpointing = True
    return model


def padding(model: nn.Module) -> nn.Module:
    model.config.pad_token_id = model.config.eos_token_id  # as scripts do
    return model


def ran(model: nn.Module) -> nn.Module:
    model(**TOKENS)
    return model


def saved_adapter(at: Path) -> nn.Module:
    import peft

    lora(4).save_pretrained(at / "a")  # type: ignore[operator]
    return peft.PeftModel.from_pretrained(llama(), at / "a").eval()  # type: ignore[no-any-return]


TRANSFORM = chain(as_blocks(), project(3))
PLAN = {"shards": [[0, 4]], "dtype": "float32"}


def is_plain(side: Side) -> bool:
    return not hasattr(side.loss_fn, "layout")


def how(side: Side) -> dict[str, Any]:
    return {} if is_plain(side) else {"transform": TRANSFORM}


def print_of(side: Side) -> Any:
    """The fingerprint of rows that are to be stored."""
    shapes = {"rows": (3, 3)}
    return fingerprint_of(side.loss_fn, side.params, TRANSFORM, shapes, batch=side.batch)


def ask(stored: Path, side: Side, **options: Any) -> Any:
    asked = (side.loss_fn, side.params)
    return Attributor(stored).ask(side.batch, asked, **options).top(1)


def stored_by(side: Side, place: Path) -> Path:
    build(side.loss_fn, side.params, [side.batch], place, **how(side))
    return place


@pytest.mark.parametrize("name", REFUSED)
def test_another_function_is_refused_when_asked_and_when_resumed(name: str, tmp_path: Path) -> None:
    first, later, field, was, now = REFUSED[name]
    before, after = first(), later()
    stored = stored_by(before, tmp_path / "index")
    said = rf"(?s)the query's {field} is .*{now}.*, and the stored rows' is .*{was}.*\(field '{field}'\)"
    with pytest.raises(FingerprintError, match=said):
        ask(stored, after)
    resume_refuses(before, after, tmp_path / "run", field, was, now)


@pytest.mark.parametrize("name", ["epsilon of a LayerNorm", "a lambda", "what no attribute tells: a private number"])
def test_the_other_door_refuses_too_and_both_are_forced(name: str, tmp_path: Path) -> None:
    first, later, field, _, _ = REFUSED[name]
    stored, after = stored_by(first(), tmp_path / "index"), later()
    rows = per_example_grads(after.loss_fn, after.params, after.batch, **how(after))
    known = provenance(after.loss_fn, after.params, rows)
    with pytest.raises(FingerprintError, match=rf"the query's {field} is .*\(field '{field}'\)"):
        Attributor(stored).ask(rows, fingerprint=known).top(1)
    for forced in (ask, lambda at, _, force: Attributor(at).ask(rows, fingerprint=known, force=force).top(1)):
        with pytest.warns(UserWarning, match=rf"forced past 1 differences: '{field}': the query's"):
            forced(stored, after, force=True)


def resume_refuses(before: Side, after: Side, place: Path, field: str, was: str, now: str) -> None:
    for side in (before, before):  # begun and killed, and resumed by the same
        with start(place, "index", {}, (), PLAN, print_of(side)):
            pass
    with pytest.raises(ValueError, match=rf"(?s)Its {field} is .*{was}.*, and this run's is .*{now}"):
        start(place, "index", {}, (), PLAN, print_of(after))


@pytest.mark.parametrize("name", DECLARED)
def test_another_loss_is_measured_where_it_is_declared_and_not_mixed(name: str, tmp_path: Path) -> None:
    first, later, field, was, now = DECLARED[name]
    before, after = first(), later()
    stored = stored_by(before, tmp_path / "index")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(ask(stored, after).values)
    resume_refuses(before, after, tmp_path / "run", field, was, now)


@pytest.mark.parametrize("name", ACCEPTED)
def test_the_same_function_is_accepted_when_asked_and_when_resumed(name: str, tmp_path: Path) -> None:
    first, later = ACCEPTED[name]
    before, after = first(tmp_path), later(tmp_path)
    stored = stored_by(before, tmp_path / "index")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(ask(stored, after).values)
    for side in (before, after._replace(batch=before.batch)):
        with start(tmp_path / "run", "index", {}, (), PLAN, print_of(side)):
            pass


def test_appended_rows_are_of_the_same_function_though_their_examples_are_others(tmp_path: Path) -> None:
    for name, (first, after) in {"net": (of(Net()), of(wrapped(Net(), 1.1))), "λ": (plain(1.0), plain(1.1))}.items():
        place = stored_by(first, tmp_path / name)
        other = torch.utils._pytree.tree_map(lambda x: x.flip(0), first.batch)
        build(first.loss_fn, first.params, [other], place, append=True, **how(first))
        with pytest.raises(ValueError, match=r"Its (function|loss) is \{\w+ of a trial: .*appended rows must be"):
            build(after.loss_fn, after.params, [other], place, append=True, **how(after))
        assert len(open_index(place)) == 8


def test_a_pass_meets_stored_queries_the_other_way_round() -> None:
    """`influence score`: the queries' side is on disk, and the corpus's at hand."""
    for before, after in ((of(Net()), of(wrapped(Net(), 1.1))), (plain(1.0), plain(1.1))):
        index = build(before.loss_fn, before.params, [before.batch], **how(before))
        rows, chosen = index.rows(), choose(index.blocks, None)
        here = [
            fingerprint_of(s.loss_fn, s.params, how(s).get("transform", per_example_transform(s)), index.blocks)
            for s in (before, after)
        ]
        matched(rows, here[0], chosen, index.fingerprint)
        with pytest.raises(FingerprintError, match="of a trial: "):
            matched(rows, here[1], chosen, index.fingerprint)


def per_example_transform(side: Side) -> Any:
    return per_example_grads(side.loss_fn, side.params, side.batch).transform


def test_examples_are_kept_only_where_they_must_be_and_are_small() -> None:
    tokens = tried(*functionalize(llama()), TOKENS)
    assert tokens["on"] == {"vocabulary": 40, "shape": [2, 8]}
    side = of(Net(), (torch.rand(9, 4), torch.zeros(9, dtype=torch.long)))
    kept = tried(*side)["on"]["examples"]["tuple"]
    assert [part["shape"] for part in kept] == [[4, 4], [4]]
    long = {"x": torch.rand(4, KEPT // 50)}
    loss = lambda params, batch: batch["x"].sum(1) * params["w"]  # noqa: E731
    params = {"w": torch.ones(())}
    assert tried(loss, params, long)["on"]["examples"]["dict"]["x"]["shape"][0] in (1, 2)
    huge = {"x": torch.rand(4, KEPT)}
    first, again, other = (tried(loss, params, x) for x in (huge, huge, {"x": torch.rand(4, KEPT)}))
    assert set(first["on"]) == {"hash"}
    assert first == again != other
    assert not apart(first, again, "losses")
    edited = tried(lambda params, batch: 1.01 * loss(params, batch), params, huge)
    assert apart(first, edited, "losses")


def test_examples_come_back_as_they_were() -> None:
    """Every type, exactly; and what is no tensor, or not finite, is not kept."""
    from influence.func.loss.trial import DTYPES, _decoded, _encoded, batch_of

    for dtype in DTYPES.values():
        x = (torch.rand(2, 0) if dtype == torch.bool else torch.tensor([[0.1, 3.0]])).to(dtype)
        back = _decoded({"dict": {"x": _encoded(x)}})["x"]
        assert back.dtype == dtype
        assert torch.equal(back, x)
    assert _encoded((torch.tensor([float("nan")]),)) is None
    assert _encoded({"x": "words"}) is None
    for damaged in ({"dtype": "object", "shape": [1], "values": [1]}, {"dict": [1]}, 7, {"dict": {"x": None}}):
        with pytest.raises(ValueError, match="a trial are damaged"):
            batch_of({"examples": damaged})
    with pytest.raises(ValueError, match="damaged"):
        batch_of({"vocabulary": 10, "shape": [2, 1 << 40]})


def test_a_trial_that_is_none_is_refused() -> None:
    """An index is data: whatever its trial says, nothing but numbers is compared."""
    side = of(Net())
    trial, rows = json.loads(json.dumps(tried(*side))), print_of(side).json()
    damaged: list[Any] = [7, {}, {**trial, "losses": 3}, {**trial, "tolerance": {"losses": 1.0}}, {**trial, "on": None}]
    for one in [*damaged, {**trial, "outputs": [[1.0]]}, {**trial, "other": 1}, {**trial, "floor": "0"}]:
        with pytest.raises(BadFileError, match=r"^the trial of a fingerprint is not what it says: "):
            Fingerprint.from_json({**rows, "recorded": {**rows["recorded"], "trial": one}})
    asked = provenance(*side[:2], per_example_grads(*side, transform=TRANSFORM))
    for on in ({}, {"examples": 3}, {"vocabulary": "x", "shape": []}, {"vocabulary": 4, "shape": [9, 1 << 60]}):
        held = {**rows, "recorded": {**rows["recorded"], "trial": {**trial, "on": on}}}
        assert [name for name, _, _ in trials_apart(asked, Fingerprint.from_json(held))] == ["loss"]


def test_another_process_says_the_same() -> None:
    """The order of sets, addresses and the seed of hashes are a process's own."""
    script = (
        "import json; from tests.test_fingerprint_function import Told, of, print_of;"
        "print(json.dumps(print_of(of(Told())).json()))"
    )
    there = {**os.environ, "PYTHONHASHSEED": "1"}
    run = subprocess.run([sys.executable, "-c", script], env=there, check=True, capture_output=True, text=True)
    assert json.loads(run.stdout) == print_of(of(Told())).json()
    assert "0x" not in run.stdout


def test_what_is_told_of_attributes() -> None:
    told = described(Told())
    known = {"cfg.width": 8, "cfg.act": "tanh", "kind": "Kind.PRE", "number": 0.5, "names": ["a", "b", "c"]}
    known |= {"smooth": ["gelu", [], {"approximate": "tanh"}], "act": "<lambda>"}
    assert {name: told[name] for name in known} == known
    left = {"cache_dir", "checkpoint", "seen", "stream", "_last", "_hidden", "training", "cfg.device", "cfg.dtype"}
    assert not left & {*told}
    assert told["layers.*"] == ["Linear", "LayerNorm", "Linear"]


def test_a_run_does_not_change_what_a_function_is() -> None:
    """A module that counts its calls, or remembers what it saw."""

    class Counts(Net):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x)

    side = of(Counts())
    first = print_of(side).json()
    side.loss_fn(side.params, side.batch)
    assert print_of(side).json() == first


@pytest.mark.parametrize("name", ["gpt_neox", "qwen2", "gemma3", "bert_classifier", "opt", "mamba", "t5", "qwen2_moe"])
def test_a_saved_model_is_described_as_it_was(name: str, tmp_path: Path) -> None:
    """Of every family; with another kernel, checkpointed, in training."""
    model = next(case for case in CASES if case.name == name).make()
    before = described(make_skeleton(model))
    other: Any = saved(model, tmp_path)
    other.config._attn_implementation = "eager"
    assert described(make_skeleton(checkpointing(other).train())) == before


def test_the_users_module_is_not_touched() -> None:
    model = llama()
    before, training = copy.deepcopy(model.state_dict()), model.training
    print_of(of(model))
    assert model.training == training
    assert all(torch.equal(x, before[n]) for n, x in model.state_dict().items())


def test_factors_refuse_another_function() -> None:
    before, after = of(llama()), of(llama(rms_norm_eps=1e-4))
    batch = {**TOKENS, "attention_mask": torch.ones_like(TOKENS["input_ids"]), "index": torch.arange(4)}
    fit = functools.partial(hessians.autocorrelation.fit, transform=TRANSFORM, labels="data", progress=False)
    factors, others = (fit(s.loss_fn, s.params, [batch]) for s in (before, after))
    factors.check_model(before.loss_fn, before.params)
    said = r"another function .*theirs has \{'config.rms_norm_eps': 1e-06.*this one \{'config.rms_norm_eps': 0.0001"
    with pytest.raises(ValueError, match=said):
        factors.check_model(after.loss_fn, after.params)
    with pytest.raises(ValueError, match="another function of the same weights"):
        hessians.mix(factors, others)


def test_factors_on_disk_refuse_another_function(tmp_path: Path) -> None:
    side = of(Net())
    step = hessians.kfac.fit(side.loss_fn, side.params, [side.batch], labels="data", progress=False)
    step.save(tmp_path / "factors.h5")
    hessians.load(tmp_path / "factors.h5").check_model(side.loss_fn, side.params)
    with pytest.raises(ValueError, match=r"'scale': 1.0\}, this one \{'scale': 2.0"):
        hessians.load(tmp_path / "factors.h5").check_model(*of(Net(scale=2.0))[:2])


def test_a_sampling_run_is_of_one_function(tmp_path: Path) -> None:
    """An epsilon moves the loss at the anchor by less than another machine does."""
    how = {"lr": 1e-4, "n_beta": 1.0, "num_chains": 1, "num_draws": 2, "batch_size": 2, "progress": False}
    for model in (net(nn.LayerNorm(8)), net(nn.LayerNorm(8))):
        side = of(model)
        data = {"input": POINTS[0], "labels": POINTS[1]}
        sgmcmc.sample(side.loss_fn, side.params, data, output_path=tmp_path / "run", **how)
    other = of(net(nn.LayerNorm(8, eps=1e-4)))
    with pytest.raises(ValueError, match=r"a run of another function \*\.eps: it has 1e-05, this one 0\.0001"):
        sgmcmc.sample(other.loss_fn, other.params, data, output_path=tmp_path / "run", **how)
    more = of(patched(net(nn.LayerNorm(8)), "1", more=3))
    with pytest.raises(ValueError, match=r"a run of another function \*\.more: it has None, this one 3"):
        sgmcmc.sample(more.loss_fn, more.params, data, output_path=tmp_path / "run", **how)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator here")
def test_the_device_does_not_count(tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        stored = stored_by(of(llama().to(dtype)), tmp_path / str(dtype))
        there = of(llama().to(dtype).cuda(), {name: x.cuda() for name, x in TOKENS.items()})
        assert len(ask(stored, there).values)
