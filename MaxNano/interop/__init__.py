"""Checkpoints and tokenizers in the formats of other projects: nanochat and Hugging Face transformers."""
