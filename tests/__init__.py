"""Tests: contracts of the library, the tasks and the flows, and of this repository itself."""
