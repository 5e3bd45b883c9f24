"""neurojepa: pretraining of a 3D sparse JEPA on brain images."""

__version__ = "0.2.0"
