"""Measurements through public doors only; each prints what it ran and what it found.

`python -m benchmarks` runs them all but `gpu`, which is for another machine; each module runs alone
too and knows `--json FILE`.
"""
