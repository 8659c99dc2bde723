"""Training of the outer loop: schedules and AdamW, checkpoints, metrics, and the loop that uses them."""
