"""Pure samplers: one file each, `build`, `State`, `init`, `step`."""
