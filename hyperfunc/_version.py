"""The version, where both the package and the modules in it can import it from."""

__version__ = "0.1.0"
