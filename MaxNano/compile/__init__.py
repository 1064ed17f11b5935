"""What programs cost: compiled for a TPU without a TPU (HLO, estimate, report, slices), or traced.

Everything else that runs on a device is elsewhere.
"""
