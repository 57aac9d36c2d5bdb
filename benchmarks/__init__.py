"""Benchmarks and the figures they leave in ``results/``. In an installation this package is ``fastrex.bench``."""
