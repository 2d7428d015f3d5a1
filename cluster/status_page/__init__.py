"""A page on the gateway's HTTP port that shows a browser what `colm top` shows a terminal (ADR 53)."""
