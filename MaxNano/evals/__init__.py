"""Evaluations: each module has one function that returns {name: value}."""
