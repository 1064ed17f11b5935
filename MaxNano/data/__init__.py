"""Training data, from files to batches: downloads (hub.py), folders and their splits (folder.py),
file formats (sources.py, lines.py), each reader's stream of documents (stream.py), worker
processes, packing, and the loader.

Chat tasks are in tasks/, and the device side of a batch is in training/.
"""
