"""The operations that need the machine's full speed, one file each, with a plain reference in the same file."""
