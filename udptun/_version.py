"""The version. A separate file, so that setup reads it without importing the package."""

__version__ = "0.1.0"
