"""The benchmarks' command line: what is judged, what is skipped by name, what is drawn; no figure is measured here."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import coefficients, every, figures, page, peers, report, sgmcmc

NEWEST = page.newest()["suites"]
OFFERED = ("collect", "curvature", "index", "training", "sgmcmc", "coefficients", "all", "report")


@pytest.mark.parametrize("suite", OFFERED)
def test_every_suite_checks_writes_and_plots(suite: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main([suite, "--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert all(flag in said for flag in ("--check", "--json", "--plot"))


def test_a_quick_run_is_not_judged(capsys: pytest.CaptureFixture[str]) -> None:
    for suite in every.SUITES:
        with pytest.raises(SystemExit):
            command.main([suite, "--check", "--quick"])
        assert "leave out --quick" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["collect", "--model", "neox", "--rounds", "2"], "--rounds (of 15 at least)"),
        (["curvature", "--rounds", "14"], "--rounds (of 15 at least)"),
        (["sgmcmc", "--rounds", "1"], "--rounds (of 7 at least)"),
        (["index", "--rows", "999", "--dim", "8"], "--rows (of 1,000,000 at least) and --dim (of 512 at least)"),
    ],
)
def test_a_smaller_run_is_not_judged(typed: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main([*typed, "--check"])
    assert f"leave out {said}" in capsys.readouterr().err


@pytest.mark.parametrize(("rounds", "kept"), [(7, True), (1, False)])
def test_a_smaller_run_is_not_kept_among_the_results(
    rounds: int, kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page of the documentation is made of the newest runs there."""
    found = {"benchmark": "training", "machine": {"date": "2026-01-02T03"}}
    monkeypatch.setattr(command, "RESULTS", tmp_path)
    monkeypatch.setattr(command.training, "run", lambda **settings: found)
    assert command.main(["training", "--rounds", str(rounds)]) == 0
    assert (tmp_path / "training-2026-01-02.json").exists() == kept


def test_a_suite_that_is_nothing_without_its_peer_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(peers, "importable", lambda package: False)
    with pytest.raises(SystemExit):
        command.main(["agree", "--quick"])
    assert "kronfluence, which is not installed" in capsys.readouterr().err


def test_a_picture_of_no_format_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ends in no format for pictures"):
        command.main(["coefficients", "--quick", "--plot", str(tmp_path / "x.jpeg2")])


def test_a_suite_writes_what_it_measured_and_draws_it(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    try:
        paths = tmp_path / "x.json", tmp_path / "x.svg"
        flags = ["--quick", "--json", str(paths[0]), "--plot", str(paths[1])]
        assert command.main(["coefficients", *flags]) == 0
    finally:
        torch.set_num_threads(threads)
    found = json.loads(paths[0].read_text())
    assert {family: len(nets) for family, nets in found["families"].items()} == {"deep linear": 1, "reduced rank": 1}
    drawn = paths[1].read_text()
    for name in ("deep linear, singular", "reduced rank, singular"):
        assert f"<!-- {name} -->" in drawn
    assert "a quick run: whether it runs, not how fast" in drawn


def test_a_missed_target_is_the_exit_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    found = NEWEST["coefficients"]
    monkeypatch.setattr(coefficients, "run", lambda **_: json.loads(json.dumps(found)))
    assert command.main(["coefficients", "--check", "--json", str(path)]) == 0
    assert {check["met"] for check in json.loads(path.read_text())["checks"]} == {True}
    worse = json.loads(json.dumps(found))
    for net in worse["families"]["reduced rank"]:
        net["error"] = -0.2
    monkeypatch.setattr(coefficients, "run", lambda **_: worse)
    assert command.main(["coefficients", "--check", "--json", str(path)]) == 1


@pytest.mark.parametrize("there", [True, False])
def test_rows_beside_a_peer_are_judged_where_it_is_and_else_skipped_by_name(
    there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = json.loads(json.dumps(NEWEST["sgmcmc"]))
    if not there:
        del found["influences"]["peer"]
    monkeypatch.setattr(peers, "importable", lambda package: there)
    monkeypatch.setattr(sgmcmc, "run", lambda **_: found)
    path = tmp_path / "x.json"
    assert command.main(["sgmcmc", "--check", "--json", str(path), "--plot", str(tmp_path / "x.svg")]) == 0
    written, said = json.loads(path.read_text()), capsys.readouterr().out
    assert ("token BIF / peer" in [check["name"] for check in written["checks"]]) == there
    assert written.get("skipped") == (None if there else {"peer": "devinterp"})
    assert ("skipped  peer: devinterp is not installed" in said) != there
    assert ("<!-- peer -->" in (tmp_path / "x.svg").read_text()) == there


@pytest.mark.parametrize("kind", sorted(NEWEST))
def test_every_committed_result_can_be_drawn_and_its_bars_are_named(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"{kind}.svg"
    figures.draw(NEWEST[kind], path)
    drawn = path.read_text()
    names = {
        "collect": ("floor", "batched", "bergson"),
        "curvature": ("ekfac", "kronfluence_lambda"),
        "index": ("scan, 32", "FAISS Flat, 1", "command", "bergson build"),
        "training": ("plain", "p = 16, scaled"),
        "sgmcmc": ("four chains together ÷ apart", "peer"),
        "coefficients": ("deep linear, a manifold of minima",),
    }[kind]
    assert all(f"<!-- {name} -->" in drawn for name in names)
    assert NEWEST[kind]["machine"]["date"][:10] in drawn


def test_what_has_no_figure_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ranks has no figure"):
        figures.draw({"benchmark": "ranks"}, tmp_path / "x.svg")


def test_whose_a_bar_is() -> None:
    kinds = {name: figures.Bar(name, 1, 1, 1).kind for name in ("scan, 1", "bergson build", "raw read", "hooks")}
    assert kinds == {"scan, 1": "influence", "bergson build": "a peer", "raw read": "neither", "hooks": "neither"}


def test_a_share_of_a_bound_is_below_one_where_it_is_met() -> None:
    for check in (report.at_most("x", 1.1, 1.2), report.at_least("x", 0.9, 0.8), report.at_most("x", 1.3, 1.2)):
        assert (figures._share(check._asdict()) < 1) == check.met
    assert figures._share(report.at_most("x", None, 1.0)._asdict()) > 1


class Suites:
    """In place of processes: writes what each suite would, unless it is one that breaks."""

    def __init__(self, missed: str = "", breaks: str = "") -> None:
        self.missed, self.breaks, self.ran = missed, breaks, []

    def run(self, typed: list[str], check: bool) -> Any:
        name, path = typed[3], Path(typed[typed.index("--json") + 1])
        self.ran.append((name, typed[4:]))
        if name == self.breaks:
            return SimpleNamespace(returncode=3)
        met = name != self.missed
        checks = [report.Check("a bar", 1.0 if met else 3.0, "≤ 2", met)._asdict()] if "--check" in typed else []
        skipped = {"a row": "bergson"} if name == "index" else {}
        machine = {"date": "2026-01-01", "processor": "one", "cores": 1}
        report.write({"benchmark": name, "machine": machine, "checks": checks, "skipped": skipped}, path)
        return SimpleNamespace(returncode=int(not met))


@pytest.mark.parametrize(
    ("missed", "breaks", "status"),
    [("", "", 0), ("training", "", 1), ("", "sgmcmc", 1)],
    ids=["met", "missed", "broke"],
)
def test_all_runs_every_suite_in_turn_and_sums_up(
    missed: str,
    breaks: str,
    status: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    suites = Suites(missed, breaks)
    monkeypatch.setattr(every.subprocess, "run", suites.run)
    monkeypatch.setattr(peers, "importable", lambda package: package != "kronfluence")
    monkeypatch.setattr(command, "RESULTS", tmp_path / "results")
    path, plot = tmp_path / "all.json", tmp_path / "all.svg"
    assert command.main(["all", "--check", "--json", str(path), "--plot", str(plot)]) == status
    assert [name for name, _ in suites.ran] == [name for name in every.SUITES if name != "agree"]
    assert all("--check" in typed for _, typed in suites.ran)
    found, said = json.loads(path.read_text()), capsys.readouterr().out
    assert found["skipped"] == {"agree": "kronfluence", "index, a row": "bergson"}
    assert "skipped  agree: kronfluence is not installed" in said
    assert set(found["suites"]) == {name for name, _ in suites.ran} - {breaks}
    assert ("FAILED" in said) == bool(breaks)
    assert "training" in plot.read_text()
    assert not (tmp_path / "results").exists()


def test_all_leaves_a_result_of_each_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(every.subprocess, "run", Suites().run)
    monkeypatch.setattr(command, "RESULTS", tmp_path)
    assert command.main(["all", "--only", "training", "loader"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loader-2026-01-01.json", "training-2026-01-01.json"]


def test_report_checks_the_page_and_the_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = page.PAGE.read_text()
    assert page.stale() == [], "run python -m benchmarks report"
    (tmp_path / "old.md").write_text(before + "more\n")
    assert page.stale(tmp_path / "old.md", tmp_path)[0] == tmp_path / "old.md"
    assert command.main(["report", "--check", "--json", str(tmp_path / "x.json")]) == int(any_missed())
    assert set(json.loads((tmp_path / "x.json").read_text())["suites"]) == set(NEWEST)
    assert page.PAGE.read_text() == before
    everything = {"benchmark": "all", "machine": NEWEST["index"]["machine"], "suites": {"index": NEWEST["index"]}}
    monkeypatch.setattr(page, "newest", lambda: {**everything, "failed": {}, "skipped": {}})
    assert command.main(["report", "--check"]) == 0
    figures.draw(page.newest(), tmp_path / "x.png")


def any_missed() -> bool:
    """Whether the newest results missed a target."""
    return any(not check["met"] for run in NEWEST.values() for check in run.get("checks", []))
