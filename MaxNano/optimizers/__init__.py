"""The optimizer: parameter groups, Muon, AdamW and their schedules. No model, no training step."""
