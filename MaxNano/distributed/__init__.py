"""Devices, meshes, shardings, multi-host start-up, compilation cache, preemption. Knows no model."""
