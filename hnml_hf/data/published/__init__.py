"""Datasets of the literature."""
