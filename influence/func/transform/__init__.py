"""Transforms of rows: blocks, projections, scales, curvature."""
