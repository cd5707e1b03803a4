"""Feature cache and lightweight heads for multi-label image classification."""

__version__ = "0.1.0"
