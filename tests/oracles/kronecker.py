"""Curvature by the plainest means: one example at a time, hooks on a copy, explicit outer products in float64.

Nothing is imported from the library. An example is stripped of its padding before the model sees it, which is what
"padding never leaks in" promises.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.oracles.loop import _call, _example, _value


class Seen(NamedTuple):
    """One example at one block: rows of inputs `[s, i]`, and for each cotangent rows of output gradients `[s, o]`."""

    inputs: Tensor
    grads: list[Tensor]

    @property
    def gradients(self) -> list[Tensor]:
        """The block's gradient `[o, i]` under each cotangent."""
        return [g.mT @ self.inputs for g in self.grads]


def expected_cotangents(output: Tensor, one: Any, kind: str, reduction: str) -> list[Tensor]:
    """`√w r` at one position for every root of the output's Fisher information."""
    z = output[0]
    if kind == "squared":
        weight = 1 / z[..., 0].numel() if reduction == "mean" else 1.0
        return [weight**0.5 * unit.reshape(output.shape) for unit in torch.eye(z.numel(), dtype=z.dtype)]
    if kind == "class":
        places, rows = [None], z[None]
    else:
        shift = 1 if kind == "causal" else 0
        labels = one["labels"][0] if "labels" in one else one["input_ids"][0]
        places = [t - shift for t in range(shift, len(labels)) if labels[t] != -100]
        rows = z
    weight = 1 / len(places) if reduction == "mean" and places else 1.0
    found = []
    for t in places:
        p = rows[0 if t is None else t].softmax(-1)
        root = torch.diag(p.sqrt()) - torch.outer(p, p.sqrt())
        torch.testing.assert_close(root @ root.mT, torch.diag(p) - torch.outer(p, p))
        for column in root.mT:
            cotangent = torch.zeros_like(output)
            (cotangent[0] if t is None else cotangent[0, t]).copy_(weight**0.5 * column)
            found.append(cotangent)
    return found


def watch(
    model: nn.Module, batch: Any, blocks: Mapping[str, str], source: str, kind: Any, reduction: str, bias: bool
) -> list[dict[str, Seen]]:
    """What every example shows at every block.

    Args:
        model: the model.
        batch: a batch.
        blocks: block name -> module name.
        source: "data" or "exact".
        kind: "causal", "tokens", "class" or "squared", or a user's loss for "data".
        reduction: "sum" or "mean".
        bias: whether a bias is the last column.
    """
    model = copy.deepcopy(model).double().requires_grad_(True)
    size = len(next(iter(batch.values() if isinstance(batch, dict) else batch)))
    examples = []
    for i in range(size):
        one = _example(batch, i, True)
        calls: dict[str, list[tuple[nn.Module, Tensor, Tensor]]] = {name: [] for name in blocks}
        handles = [
            model.get_submodule(module).register_forward_hook(
                lambda m, args, out, mine=calls[name]: mine.append((m, args[0].detach(), out))
            )
            for name, module in blocks.items()
        ]
        output = _call(model, one)
        for handle in handles:
            handle.remove()
        logits = output if isinstance(output, Tensor) else output.logits
        flat = [(name, *call) for name, many in calls.items() for call in many]
        if source == "data":
            scalars = [_squared(logits, one, reduction) if kind == "squared" else _value(output, one, kind, reduction)]
        else:
            scalars = [(logits * c).sum() for c in expected_cotangents(logits.detach(), one, kind, reduction)]
        grads = [
            torch.autograd.grad(s, [out for *_, out in flat], retain_graph=True, allow_unused=True) for s in scalars
        ]
        seen = {}
        for name in blocks:
            places = [k for k, entry in enumerate(flat) if entry[0] == name]
            parts = [
                arrange(
                    flat[k][1],
                    flat[k][2],
                    [torch.zeros_like(flat[k][3]) if g[k] is None else g[k] for g in grads],
                    bias,
                )
                for k in places
            ]
            seen[name] = Seen(
                torch.cat([x for x, _ in parts]),
                [torch.cat([gs[c] for _, gs in parts]) for c in range(len(scalars))],
            )
        examples.append(seen)
    return examples


def _squared(output: Tensor, one: Any, reduction: str) -> Tensor:
    terms = (output - one["labels"]).square().sum(-1) / 2
    return terms.mean() if reduction == "mean" else terms.sum()


def arrange(module: nn.Module, x: Tensor, grads: list[Tensor], bias: bool) -> tuple[Tensor, list[Tensor]]:
    """Rows of inputs and rows of output gradients of one call."""
    if isinstance(module, nn.Embedding):
        ids = x.flatten()
        one_hot = F.one_hot(ids, module.num_embeddings).double()
        live = torch.ones_like(ids, dtype=torch.bool) if module.padding_idx is None else ids != module.padding_idx
        # an embedding's block is [V, d]: its tokens are the left factor, so they take the place of the gradients
        return one_hot[live], [g.flatten(0, -2)[live] for g in grads]
    if isinstance(module, nn.Conv2d):
        k, d, p, s = module.kernel_size, module.dilation, module.padding, module.stride
        patches = F.unfold(x, k, d, p, s)[0].mT.reshape(-1, module.groups, module.weight[0].numel())
        inputs = patches.transpose(0, 1).flatten(0, 1)  # [groups · places, c k]
        rows = []
        for g in grads:
            flat = g[0].flatten(1).mT  # [places, o]
            own = flat.shape[1] // module.groups
            masked = torch.zeros(module.groups, *flat.shape, dtype=flat.dtype)
            for group in range(module.groups):
                masked[group, :, group * own : (group + 1) * own] = flat[:, group * own : (group + 1) * own]
            rows.append(masked.flatten(0, 1))
    else:
        inputs, rows = x.flatten(0, -2), [g.flatten(0, -2) for g in grads]
    if bias and module.bias is not None:
        inputs = torch.cat([inputs, torch.ones(len(inputs), 1, dtype=inputs.dtype)], 1)
    return inputs, rows


def fisher(examples: list[dict[str, Seen]], name: str) -> Tensor:
    """`(1/N) Σ_n Σ_c vec(G) vec(G)^T`."""
    rows = torch.stack([g.flatten() for one in examples for g in one[name].gradients])
    return rows.mT @ rows / len(examples)


def kfac(examples: list[dict[str, Seen]], name: str) -> Tensor:
    """`S ⊗ A`."""
    x = torch.cat([one[name].inputs for one in examples])
    g = torch.cat([rows for one in examples for rows in one[name].grads])
    return torch.kron(g.mT @ g / len(examples), x.mT @ x / len(x))


def tkfac(examples: list[dict[str, Seen]], name: str) -> Tensor:
    """`E[tr(A_n) S_n] ⊗ E[tr(S_n) A_n] / E[tr A_n tr S_n]`, example by example."""
    left = right = scale = torch.zeros(())
    for one in examples:
        a = one[name].inputs.mT @ one[name].inputs
        s = sum(g.mT @ g for g in one[name].grads)
        left, right, scale = left + a.trace() * s, right + s.trace() * a, scale + a.trace() * s.trace()
    return torch.kron(left, right) / scale / len(examples)


def shampoo(examples: list[dict[str, Seen]], name: str) -> Tensor:
    """`E[G G^T] ⊗ E[G^T G] / tr`."""
    rows = [g for one in examples for g in one[name].gradients]
    left, right = sum(g @ g.mT for g in rows), sum(g.mT @ g for g in rows)
    return torch.kron(left, right) / left.trace() / len(examples)


METHODS: dict[str, Callable[[list[dict[str, Seen]], str], Tensor]] = {"kfac": kfac, "tkfac": tkfac, "shampoo": shampoo}
