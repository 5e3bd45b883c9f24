"""Benchmarks: each measures both sides in one run, prints a table and, last, one JSON object."""
