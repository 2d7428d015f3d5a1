"""Secrets as files, authorities and certificates; what a cluster leaves open, looked at before it starts."""
