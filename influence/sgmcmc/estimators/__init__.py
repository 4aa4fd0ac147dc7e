"""What is estimated from finished chains, with errors."""
