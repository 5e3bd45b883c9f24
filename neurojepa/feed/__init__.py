"""disk -> batch: the feed's format, its order, and the loader that reads it."""
