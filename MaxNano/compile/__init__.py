"""Programs compiled for a TPU without a TPU: HLO, estimated cost, report, slices.

Everything that runs on a device is elsewhere.
"""
