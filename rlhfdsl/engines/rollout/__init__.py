"""Sampling answers from the weights that are being trained."""
