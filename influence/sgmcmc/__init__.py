"""Posterior sampling around trained weights: pure steps, chains, LLC, influence functions, susceptibilities."""

from influence.sgmcmc import (
    adam_sgld,
    bif,
    diagnostics,
    leimkuhler_matthews,
    llc,
    mala,
    moments,
    rmsprop_sgld,
    sghmc,
    sgld,
    sgnht,
    susceptibility,
    theory,
)
from influence.sgmcmc.drive import DivergedError
from influence.sgmcmc.gradients import gradient_at
from influence.sgmcmc.joining import join
from influence.sgmcmc.langevin import Info, Sampler
from influence.sgmcmc.options import Options
from influence.sgmcmc.order import Source
from influence.sgmcmc.restrict import masks, preview
from influence.sgmcmc.run import Observed, Run
from influence.sgmcmc.sampling import sample, sample_restrictions
from influence.sgmcmc.target import Target, default_n_beta, local_posterior
from influence.sgmcmc.traces import load

__all__ = [
    "DivergedError",
    "Info",
    "Observed",
    "Options",
    "Run",
    "Sampler",
    "Source",
    "Target",
    "adam_sgld",
    "bif",
    "default_n_beta",
    "diagnostics",
    "gradient_at",
    "join",
    "leimkuhler_matthews",
    "llc",
    "load",
    "local_posterior",
    "mala",
    "masks",
    "moments",
    "preview",
    "rmsprop_sgld",
    "sample",
    "sample_restrictions",
    "sghmc",
    "sgld",
    "sgnht",
    "susceptibility",
    "theory",
]
