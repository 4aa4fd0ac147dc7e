"""Pictures: what is in them, what is refused, and that drawing touches nothing of matplotlib's own settings."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from influence import sgmcmc, viz

matplotlib = pytest.importorskip("matplotlib")


def run(dims: int = 4, lr: float = 1e-2, **settings: Any) -> sgmcmc.Run:
    loss = lambda w, _: w["w"].square().sum() / 2  # noqa: E731
    known: dict[str, Any] = {"n_beta": 10.0, "num_draws": 40, "progress": False} | settings
    return sgmcmc.sample(loss, {"w": torch.zeros(dims, dtype=torch.float64)}, None, lr=lr, **known)


def test_traces_end_at_the_estimate_and_its_error() -> None:
    found = sgmcmc.llc.estimate(run())
    above, below = viz.llc_traces(found).axes
    mean = below.get_lines()[len(found.per_chain)]
    assert float(mean.get_ydata()[-1]) == pytest.approx(found.mean)
    band = below.collections[0].get_paths()[0].vertices
    last = band[band[:, 0] == 40, 1]
    assert float(last.max() - last.min()) == pytest.approx(4 * found.stderr)
    assert f"{found.mean:.4g} ± {found.stderr:.2g}" in above.get_title()
    both = viz.llc_traces({"full": found, "l0h1": sgmcmc.llc.estimate(run(2))})
    assert [text.get_text().split(":")[0] for text in both.axes[1].get_legend().get_texts()] == ["full", "l0h1"]
    short = sgmcmc.llc.estimate(run(num_draws=3, num_chains=1))
    assert viz.llc_traces(short).axes  # no error is known of three steps


def test_a_plateau_marks_what_diverged(tmp_path: Path) -> None:
    loss = lambda w, _: w["w"].square().sum() / 2  # noqa: E731
    grid = sgmcmc.llc.calibrate(
        loss, {"w": torch.zeros(2)}, None, lrs=[1e-3, 10.0], localizations=[0.0], n_beta=10.0, num_draws=200,
        num_burnin_steps=300, progress=False,
    )  # fmt: skip
    axes = viz.plateau(grid).axes[0]
    crosses = [line for line in axes.get_lines() if line.get_marker() == "x"]
    assert [list(line.get_xdata()) for line in crosses] == [[10.0]]


def test_a_heat_map_is_white_at_zero_and_says_what_its_tokens_are() -> None:
    matrix = torch.tensor([[9.0, -0.5, 0.1], [-0.5, 9.0, 0.2], [0.1, 0.2, 9.0]])
    axes = viz.heat_map(matrix, [" a$b$", "the", "\n"], ["x", "y", "z"]).axes[0]
    shown = axes.get_images()[0]
    assert shown.get_clim() == pytest.approx((-0.5, 0.5))  # the diagonal does not drown the rest
    assert [text.get_text() for text in axes.get_yticklabels()] == [r"·a\$b\$", "the", "⏎"]
    assert viz.heat_map(torch.full((3, 3), float("nan"))).axes
    with pytest.raises(ValueError, match="there are 3 rows and 2 labels"):
        viz.heat_map(matrix, ["a", "b"])
    big = viz.heat_map(torch.randn(200, 300), [str(i) for i in range(200)])
    assert len(big.axes[0].get_yticklabels()) < 30  # too many to read: numbers of rows instead


@pytest.mark.parametrize(("sign", "scale"), [(1, (0.0, 2.0)), (-1, (-2.0, 0.0)), (0, (-2.0, 2.0))])
def test_the_scale_of_a_heat_map_shows_the_signs_that_there_are(sign: int, scale: tuple[float, float]) -> None:
    matrix = torch.tensor([[0.0, 2.0], [1.0, float("nan")]]) * (sign or torch.tensor([1.0, -1.0]))
    shares, bar = viz.heat_map(matrix, limit=2.0).axes
    assert bar.get_ylim() == pytest.approx(scale)
    assert shares.get_images()[0].get_clim() == pytest.approx((-2.0, 2.0))  # white stays at zero


def test_susceptibilities_lie_where_their_components_say() -> None:
    source = torch.Generator().manual_seed(0)
    matrix = torch.randn(30, 4, generator=source)
    made = viz.susceptibility_plane(matrix, list("abcd"), [f"t{i}" for i in range(30)], ["x"] * 10 + ["y"] * 20)
    plane, bars = made.axes
    points = torch.cat([torch.as_tensor(each.get_offsets().data) for each in plane.collections])
    expected = sgmcmc.susceptibility.pca(matrix, 2)
    torch.testing.assert_close(points, expected.scores, rtol=1e-6, atol=1e-6)
    assert [text.get_text() for text in bars.get_yticklabels()] == list("abcd")
    widths = torch.tensor([bar.get_width() for bar in bars.patches[:4]], dtype=torch.float64)
    torch.testing.assert_close(widths, expected.loadings[:, 0])
    farthest = int(expected.scores[:, 0].abs().argmax())
    assert f"t{farthest}" in {text.get_text() for text in plane.texts}
    assert plane.get_title() == "susceptibilities of 30 tokens"
    examples = viz.susceptibility_plane(matrix, list("abcd"), kind="examples")
    assert examples.axes[0].get_title() == "susceptibilities of 30 examples"
    with pytest.raises(ValueError, match="needs two restrictions"):
        viz.susceptibility_plane(matrix[:, :1], ["a"])


def test_spectra_say_their_effective_rank() -> None:
    """Of equal eigenvalues the rank is their number."""
    made = viz.spectra({"flat": torch.full((8,), 0.3), "one": torch.tensor([2.0, 0.0, -1e-9])})
    curves, bars = made.axes
    assert [text.get_text().strip() for text in bars.texts] == ["8 of 8", "1 of 3"]
    assert [len(line.get_xdata()) for line in curves.get_lines()] == [8, 1]
    with pytest.raises(ValueError, match="no spectrum"):
        viz.spectra({})


def test_scores_and_recall() -> None:
    scores = torch.arange(-50.0, 51.0)
    axes = viz.score_distributions(scores, k=3).axes[0]
    assert sum(bar.get_height() for bar in axes.patches) == 101
    ticks = next(line for line in axes.get_lines() if line.get_marker() == "|")
    assert [float(x) for x in ticks.get_xdata()] == [-50, -49, -48, 48, 49, 50]
    with pytest.raises(ValueError, match="no finite number"):
        viz.score_distributions({"a": torch.tensor([float("nan")])})
    seeds = torch.tensor([[0.5, 1.0], [0.7, 1.0]])
    axes = viz.recall_curves({"ekfac": seeds, "bm25": torch.tensor([0.1, 0.2])}).axes[0]
    assert [float(x) for x in axes.get_lines()[0].get_ydata()] == pytest.approx([0.6, 1.0])
    assert len(axes.collections) == 1  # one of them has seeds
    with pytest.raises(ValueError, match="has 2 values, and there are 3"):
        viz.recall_curves({"a": torch.ones(2)}, at=torch.arange(1, 4))


def test_what_is_differentiated_through_can_be_drawn() -> None:
    """Losses of a pure function are such; numpy refuses them in words that say nothing of a picture."""
    values = torch.tensor([3.0, 2.0, 0.5], requires_grad=True) * 1
    assert "3 scores" in viz.score_distributions(values).axes[0].get_title()
    assert viz.recall_curves({"a": values / 3}).axes[0].lines[0].get_ydata()[0] == 1
    assert "of 3" in viz.spectra({"a": values}).axes[1].texts[0].get_text()
    assert viz.heat_map(values[None]).axes[0].images[0].get_array().max() == 3


def test_nothing_of_matplotlib_changes(tmp_path: Path) -> None:
    """No figure of pyplot's, which stay in memory, and no settings."""
    from matplotlib._pylab_helpers import Gcf

    before = dict(matplotlib.rcParams)
    viz.save(viz.llc_traces(sgmcmc.llc.estimate(run())), tmp_path / "new" / "a.pdf")
    assert dict(matplotlib.rcParams) == before
    assert not Gcf.figs
    assert (tmp_path / "new" / "a.pdf").read_bytes().startswith(b"%PDF")
    with pytest.raises(ValueError, match=r"choose \.png, \.pdf or \.svg"):
        viz.check("a.docx")
    with pytest.raises(ValueError, match=r"choose \.png"):
        viz.check("noending")


def test_without_the_extra_it_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'influence\[viz\]'"):
        viz.check("a.png")
