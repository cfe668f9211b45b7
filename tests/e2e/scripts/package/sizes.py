"""Something to import from beside the module."""

WIDTH = 4
