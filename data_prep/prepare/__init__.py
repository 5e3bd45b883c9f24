"""Manifests -> the archive: a driver, a task per person, a watched child that does the work."""
