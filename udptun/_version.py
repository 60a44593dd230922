"""The version, in a leaf of its own: setup reads it without importing the package."""

__version__ = "0.1.0"
