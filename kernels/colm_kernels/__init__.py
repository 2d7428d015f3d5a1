"""The operations where the machine's speed is at stake, one file each, with a plain reference beside each."""
