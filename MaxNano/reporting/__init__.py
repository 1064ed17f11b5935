"""The report of a run: reads a run's folder, gathers facts, renders pages. Changes nothing else in
it.
"""
