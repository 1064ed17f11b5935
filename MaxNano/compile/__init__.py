"""What programs cost: compiled for a TPU or GPU without one (HLO, estimate, report), or traced.

Everything else that runs on a device is elsewhere.
"""
