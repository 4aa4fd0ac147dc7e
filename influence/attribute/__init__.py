"""Attribution methods as functions of any module: which training examples made it answer as it does."""

from influence.attribute.methods import cosine, ekfac, trackstar
from influence.attribute.over_checkpoints import less, tracin, trak
from influence.attribute.scores import Ranked, Scores, load

__all__ = ["Ranked", "Scores", "cosine", "ekfac", "less", "load", "tracin", "trackstar", "trak"]
