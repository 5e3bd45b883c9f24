"""ADNI as LONI delivers it."""
