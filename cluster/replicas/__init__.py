"""The nodes and the gateway as Ray Serve runs them."""
