"""Faults on purpose: `make chaos` (docs/reliability.md has what was found)."""
