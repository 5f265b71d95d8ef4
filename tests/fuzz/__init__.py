"""Fuzzing of what strangers write: sources of every format, and the documents and tables of a store."""
