"""The parts of a training run: set-up, steps, stages, rollouts, checkpoints, metrics. The loop is train.py."""
