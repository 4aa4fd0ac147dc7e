"""Pictures of results as matplotlib figures (the extra `viz`), readable without tuning and without colour vision."""

from influence.viz.attribution_plots import heat_map, recall_curves, score_distributions, spectra
from influence.viz.canvas import check, save
from influence.viz.sampling_plots import llc_traces, plateau, susceptibility_plane

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
