"""Measurements through public doors only; each prints what it ran and what it found.

`python -m benchmarks` runs them all; each module runs alone too and knows `--json FILE`.
"""
