"""Evaluations of a run; base.py has the protocol and the table EVALS.

The chat tasks themselves are in tasks/.
"""
