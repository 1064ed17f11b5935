"""MaxNano: train your own small ChatGPT in JAX; one config, one train.py."""
