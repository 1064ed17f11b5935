"""A training run below the loop of train.py: set-up, steps, stages, rollouts, checkpoints, metrics.

The model belongs in models/, what is measured at intervals in evals/.
"""
