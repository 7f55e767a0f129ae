"""Runs by name: who runs, where it answers, what it left, and how it is ended."""
