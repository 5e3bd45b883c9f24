"""ABCD: NBDC releases and NDA packages."""
