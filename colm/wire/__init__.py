"""Messages and services between the processes; the contract in prose is proto/README.md."""
