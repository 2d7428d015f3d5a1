"""Large clusters, simulated: the cluster's own decisions under a clock that jumps, and a model of what takes time."""
