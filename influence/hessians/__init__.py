"""Curvature: one method a file, each with `build` and `fit`; what a fit returns; exact products and solvers."""

from influence.hessians import cg, lissa, products
from influence.hessians.damping import DampingCurve, implied_regularization, select_damping
from influence.hessians.factors import Factors, load
from influence.hessians.fitting import fit, step
from influence.hessians.method import Method
from influence.hessians.mixing import mix, mixing_weight
from influence.hessians.table import METHODS, build

__all__ = [
    *METHODS,
    "METHODS",
    "DampingCurve",
    "Factors",
    "Method",
    "build",
    "cg",
    "fit",
    "implied_regularization",
    "lissa",
    "load",
    "mix",
    "mixing_weight",
    "products",
    "select_damping",
    "step",
]
