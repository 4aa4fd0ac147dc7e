"""How per-example gradients are computed: probes, traces, rules, plans and engines."""
