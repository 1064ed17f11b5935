"""Devices: start-up, mesh, sharding rules, chip table, compilation cache, preemption. No model, no
data.
"""
