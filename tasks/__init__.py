"""Prefect tasks: library calls with retries, cache keys and progress.

A task takes and returns small JSON values only: keys, hashes and counts, never rows, arrays or models.
"""
