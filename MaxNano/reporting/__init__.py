"""The report of a run, comparisons and leaderboards: read runs' folders, gather facts, render pages.

Nothing else in the folders changes.
"""
