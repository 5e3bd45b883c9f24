"""Training: launch, loop, engine, checkpoints, metrics."""
