"""Distilling a chain: the trainer, its data and recipes."""
