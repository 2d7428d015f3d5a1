"""How fast keys and values travel between two processes of one machine."""
