"""What the prefill nodes, the decode nodes and their clients must agree on."""

import os

# PyTorch's OpenMP threads spin while they wait. Where more threads are ready than cores, as with two nodes on one
# machine, spinning threads use up their time slices and everybody waits for whole slices: a decode step grew 8x.
# OpenMP reads this variable when PyTorch is imported, and every process of the system imports this file first. A
# user's own setting wins.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
