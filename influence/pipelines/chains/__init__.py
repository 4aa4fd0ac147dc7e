"""What the sampling commands share: their settings, the posterior, finished chains."""
