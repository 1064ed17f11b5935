"""Reads a run's folder and writes it up: the history of a run, charts and the report page. Never changes a run."""
