"""Cohort trees -> quality-checked, normalised volumes in a Zarr archive and a WebDataset feed."""
