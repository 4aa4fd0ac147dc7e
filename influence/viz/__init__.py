"""Pictures of results, as matplotlib figures (the extra `viz`): readable without tuning, and without colour vision."""

from influence.viz.canvas import check, save
from influence.viz.coefficient import llc_traces, plateau
from influence.viz.influences import heat_map
from influence.viz.recall import recall_curves
from influence.viz.scores import score_distributions
from influence.viz.spectra import spectra
from influence.viz.susceptibility import susceptibility_plane

__all__ = [
    "check",
    "heat_map",
    "llc_traces",
    "plateau",
    "recall_curves",
    "save",
    "score_distributions",
    "spectra",
    "susceptibility_plane",
]
