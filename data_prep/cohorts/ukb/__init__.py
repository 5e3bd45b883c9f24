"""UK Biobank's bulk packages and tables."""
