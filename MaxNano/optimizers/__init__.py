"""Muon and AdamW as optax transformations, which parameters each of them trains, and the schedules."""
