"""The front door: whatever the protocol, a request comes in here and one answer goes out."""
