"""What a pipeline attributes to when nobody says: the matrices of the repeated layers."""

from torch import nn

from influence.families import places
from influence.func.functionalize import module_layout


def layer_matrices(model: nn.Module) -> tuple[str, ...]:
    """Return the default targets of every pipeline: the matrices of a model's repeated layers.

    Embeddings, unembeddings, norms and biases are not among them, nor are tables inside layers (T5's relative
    positions); fused experts are. Of a model with adapters they are the matrices of the active adapters. A model
    without repeated layers gives all its matrices but embeddings.

    Args:
        model: any module.

    Returns:
        Names of parameters, for `functionalize(model, targets=...)`.

    Raises:
        ValueError: if the model has no matrix.

    Example:
        >>> from torch import nn
        >>> layer = lambda: nn.ModuleDict({"attn": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})
        >>> layer_matrices(nn.Sequential(nn.Embedding(9, 4), layer(), layer(), nn.Linear(4, 9)))
        ('1.attn.weight', '2.attn.weight')
    """
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
    layout = module_layout(model)
    matrices = [
        name
        for name, p in model.named_parameters()
        if layout[name].is_matrix and p.is_floating_point() and id(p) not in tables
    ]
    if not matrices:
        raise ValueError(f"{type(model).__name__} has no matrix to take as a target: name some by targets=")
    where = places(name for name, _ in model.named_parameters())
    inside = [name for name in matrices if where[name].stack is not None] or matrices
    adapters = active_adapters(model)
    return tuple([name for name in inside if name.startswith(adapters)] or inside)


def active_adapters(model: nn.Module) -> tuple[str, ...]:
    """Return how the names of a PEFT model's active adapter parameters begin; nothing for any other model."""
    return tuple(
        f"{name}.{kind}.{adapter}".removeprefix(".")
        for name, module in model.named_modules()
        for kind in getattr(module, "adapter_layer_names", ())
        for adapter in module.active_adapters
    )
