"""BIDS datasets, and folders of loose files."""
