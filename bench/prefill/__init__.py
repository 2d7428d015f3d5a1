"""How fast chain 1 reads a prompt, beside what a matrix product reaches on the same machine at the same time."""
