"""Measurements against the peers: `python -m benchmarks.recovery`, `.overhead`, `.startup`; each takes `--json`."""
