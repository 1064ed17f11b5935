"""The search for the fastest settings on the devices that are there, and the files it leaves.

candidates (what is tried), search (in which order), children (a process per measurement), measure
and kernels (what such a process does), results (journal and table), tuned_file (what train.py
reads).
"""
