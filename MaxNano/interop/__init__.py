"""Models in the formats of other projects: nanochat and Hugging Face transformers. No conversion of
data sets.
"""
