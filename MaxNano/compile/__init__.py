"""Reads compiled programs: HLO, the estimated cost of a step, and the TPU slices to compile for."""
