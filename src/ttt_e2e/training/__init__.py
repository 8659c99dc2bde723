"""Training of the outer loop: the loop itself, its optimizer, checkpoints, metrics and evaluation."""
