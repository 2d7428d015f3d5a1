"""What the prefill nodes, the decode nodes and their clients must agree on."""
