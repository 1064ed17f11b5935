"""Tokenizers of four types with one interface (tokenizer.py), and the chat format (chat_format.py).

Nothing here knows about models or data sets; train_tokenizer.py trains a tokenizer.
"""
