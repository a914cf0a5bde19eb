"""Bandwidth of a container's stdio, against that of the device it all passes through."""
