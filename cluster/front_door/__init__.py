"""The front door: the gateway's core, which serves a request whatever its protocol."""
