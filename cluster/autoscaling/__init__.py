"""How many replicas each pool has: decided by the load of its own kind, within the limits of its section."""
