"""The same rows on every device and, within rounding, in every dtype: run this file where there is an accelerator."""

from typing import Any

import pytest
import torch
from torch import Tensor

from influence import (
    Moments,
    as_blocks,
    chain,
    functionalize,
    hessians,
    kfac_whiten,
    per_example_grads,
    precondition,
    project,
    scale_by_adafactor,
    scale_by_adam,
    split_heads,
    unit_norm,
)
from tests.cases import CASES

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator here")),
]
GPT2 = next(case for case in CASES if case.name == "gpt2")
IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 0], [9, 9, 1, 2]])


def rows_on(device: str, dtype: torch.dtype, transform: Any = None, **settings: Any) -> dict[str, Tensor]:
    model = GPT2.make().to(device, dtype)
    loss_fn, params = functionalize(model)
    sketch = transform(params) if transform else None
    return per_example_grads(loss_fn, params, {"input_ids": IDS.to(device)}, transform=sketch, **settings)


def ones(params: dict[str, Tensor]) -> Moments:
    return Moments({name: torch.full_like(p, 0.25) for name, p in params.items()})


TRANSFORMS = {
    "raw": None,
    "projected": lambda params: chain(as_blocks(bias=True), split_heads(), project(3), unit_norm()),
    "adam": lambda params: chain(as_blocks(bias=True), scale_by_adam(ones(params)), project(3)),
    "adafactor": lambda params: chain(as_blocks(), scale_by_adafactor(ones(params)), project(3)),
    **{
        kind: lambda params, kind=kind: chain(as_blocks(), project(5, kind=kind, target="global"))
        for kind in ("sparse", "srht", "normal")
    },
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("engine", ["batched", "vmap"])
def test_rows_are_those_of_the_loop_on_the_cpu(device: str, name: str, engine: str) -> None:
    # sketches are drawn on the CPU and moved; moments, slices and scales follow the parameters' device
    rows = rows_on(device, torch.float64, TRANSFORMS[name], engine=engine)
    expected = rows_on("cpu", torch.float64, TRANSFORMS[name], engine="loop")
    for block, row in expected.items():
        assert rows[block].device.type == device
        torch.testing.assert_close(rows[block].cpu(), row, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("name", ["raw", "projected", "sparse"])
def test_narrow_dtypes_keep_the_direction(device: str, dtype: torch.dtype, tolerance: float, name: str) -> None:
    rows = rows_on(device, dtype, TRANSFORMS[name], engine="batched")
    expected = rows_on("cpu", torch.float64, TRANSFORMS[name], engine="batched")
    got, wanted = (torch.cat([row.double().cpu().flatten(1) for row in r.values()], 1) for r in (rows, expected))
    assert ((got - wanted).norm(dim=1) <= tolerance * wanted.norm(dim=1)).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", ["kfac", "tkfac", "shampoo", "ekfac"])
def test_curvature_is_that_of_the_cpu_and_whitens_on_its_own_device(device: str, method: str, tmp_path: Any) -> None:
    # sampled labels are hashed, not drawn by a device's generator; loaded factors follow the rows to their device
    blocks = as_blocks(bias=True)

    def fitted(device: str) -> Any:
        loss_fn, params = functionalize(GPT2.make().to(device), targets=["*mlp*", "*ln_1*"])
        batch = {"input_ids": IDS.to(device), "index": torch.arange(3, device=device)}
        fit = getattr(hessians, method).fit
        return loss_fn, params, batch, fit(loss_fn, params, [batch], transform=blocks, progress=False)

    loss_fn, params, batch, factors = fitted(device)
    for name, curvature in fitted("cpu")[3].blocks.items():
        torch.testing.assert_close(factors.blocks[name].dense().cpu(), curvature.dense(), rtol=1e-9, atol=1e-12)
    factors.save(tmp_path / "factors.h5")
    loaded = hessians.load(tmp_path / "factors.h5")
    transforms = [precondition(loaded, power=-0.5)] + ([] if method == "ekfac" else [kfac_whiten(loaded, dim=3)])
    for transform in transforms:
        rows = per_example_grads(loss_fn, params, batch, transform=chain(blocks, transform))
        assert {row.device.type for row in rows.values()} == {device}
