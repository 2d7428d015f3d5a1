"""A million tokens through a prefill node: time, memory, and a short prompt in the middle."""
