"""The structural scans of a session: brain masks, bias fields, intensities."""
