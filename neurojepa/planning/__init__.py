"""What a training step will cost, counted before any device is at hand."""
