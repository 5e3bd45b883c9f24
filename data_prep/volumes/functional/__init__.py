"""PET, BOLD and CIFTI -> maps, placed by the anatomy of their person."""
