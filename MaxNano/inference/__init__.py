"""The model at inference: KV cache, decoding, sampling, shared-prefix scoring, continuous batching.

Loading a checkpoint belongs in training/loading.py, HTTP and the terminal in serving/.
"""
