"""The training losses, and which parameters train."""
