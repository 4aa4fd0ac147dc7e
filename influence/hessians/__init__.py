"""Curvature: one method a file, each with `fit`; what a fit returns; exact products and solvers to judge them by."""

from influence.hessians import autocorrelation, cg, ekfac, kfac, lissa, products, shampoo, tkfac
from influence.hessians.factors import Factors, load

__all__ = ["Factors", "autocorrelation", "cg", "ekfac", "kfac", "lissa", "load", "products", "shampoo", "tkfac"]
