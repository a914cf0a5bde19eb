"""Containers inside virtual machines: the host side."""

__version__ = "0.1.0"
