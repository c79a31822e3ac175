"""Loaders of the compiled parts. Each keeps the reason when its part is absent."""
