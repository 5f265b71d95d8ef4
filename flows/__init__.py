"""Prefect flows and the command line: they compose tasks and touch no data themselves."""
