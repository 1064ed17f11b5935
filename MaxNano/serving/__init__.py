"""Clients of the engine: the OpenAI-compatible server with its web page, and the terminal chat.

Running the model and decoding its tokens belong in inference/.
"""
