"""Floor 2: pages and their names. Knows no tensors, no requests, no text.

A sealed page is immutable and named by everything before its end, so sharing, preemption,
resuming and restarting are one operation: match the prefix, and compute what is missing.
"""
