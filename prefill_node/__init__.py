"""The prefill node: chain 1 of a prompt becomes KV tiles on a stream."""
