"""Curvature: one method a file, each with `fit`; what a fit returns; exact products and solvers to judge them by."""

from influence.hessians import autocorrelation, cg, ekfac, kfac, lissa, products, shampoo, tkfac
from influence.hessians.damping import DampingCurve, implied_regularization, select_damping
from influence.hessians.factors import Factors, load
from influence.hessians.mixing import mix, mixing_weight

__all__ = [
    "DampingCurve",
    "Factors",
    "autocorrelation",
    "cg",
    "ekfac",
    "implied_regularization",
    "kfac",
    "lissa",
    "load",
    "mix",
    "mixing_weight",
    "products",
    "select_damping",
    "shampoo",
    "tkfac",
]
