"""The version, for those who may not import the package whole."""

__version__ = "0.1.0"
