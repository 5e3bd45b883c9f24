"""Using exported weights: embeddings, probes, their statistics and report."""
