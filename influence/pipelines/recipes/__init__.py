"""What the recipes share: their steps, and sums over checkpoints."""
