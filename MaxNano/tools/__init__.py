"""What a chat model may call: the calculator, and a sandbox that runs Python it wrote."""
