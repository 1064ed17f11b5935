"""Tokenizers: training, loading, encoding, decoding, and rendering conversations as tokens."""
