"""Cohort adapters: each turns a source tree into Scan records, and nothing else."""
