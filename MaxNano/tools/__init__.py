"""Tools of a chat model: the calculator, and the sandbox that runs Python code it writes.

The dialogue with a model, in which it calls them, is in inference/.
"""
