"""Benchmarks: each prints what it measured, with the machine's facts; none is a timed test."""
