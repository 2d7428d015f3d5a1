"""The cluster: the gateway, the application that Ray Serve runs, and the `colm` command."""
