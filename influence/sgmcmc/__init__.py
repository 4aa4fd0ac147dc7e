"""Posterior sampling around trained weights: pure steps, chains, LLC, influence functions, susceptibilities."""

from collections.abc import Callable, Mapping

from influence.sgmcmc.estimators import bif, diagnostics, llc, moments, susceptibility, theory
from influence.sgmcmc.runner.draws import Observed, Run
from influence.sgmcmc.runner.joining import join
from influence.sgmcmc.runner.loop import DivergedError
from influence.sgmcmc.runner.minibatches import Source
from influence.sgmcmc.runner.restrict import masks, preview
from influence.sgmcmc.runner.sampling import sample, sample_restrictions
from influence.sgmcmc.runner.schedule import Options
from influence.sgmcmc.runner.traces import load
from influence.sgmcmc.samplers import adam_sgld, leimkuhler_matthews, mala, rmsprop_sgld, sghmc, sgld, sgnht
from influence.sgmcmc.samplers.langevin import Info, Sampler
from influence.sgmcmc.samplers.target import Target, default_n_beta, gradient_at, local_posterior

__all__ = [
    "SAMPLERS",
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

SAMPLERS: Mapping[str, Callable[..., Sampler]] = {
    module.__name__.rpartition(".")[2]: module.build
    for module in (sgld, rmsprop_sgld, adam_sgld, sghmc, sgnht, leimkuhler_matthews, mala)
}
"""The samplers by name, each as what builds it; the command line's choices and the conformance tests read it."""
