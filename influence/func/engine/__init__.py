"""How per-example gradients are computed: the trace, the plan, the engines, and the families of operations."""
