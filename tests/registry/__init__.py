"""Tests of the registry; a package, as its modules share fixtures and helpers."""
