"""The version. It is in a separate file, so that setup.py reads it without importing the package.
"""

__version__ = "0.1.0"
