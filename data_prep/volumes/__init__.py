"""Voxels: from scan files to volumes on the archive grid (entry: pipeline.prepare_person)."""
