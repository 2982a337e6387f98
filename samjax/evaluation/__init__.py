"""Metrics, and the jitted evaluation that measures them over a set."""
