"""Spaces, as data of the package."""
