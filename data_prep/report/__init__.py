"""An archive on one HTML page."""
