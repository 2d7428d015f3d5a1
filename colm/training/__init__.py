"""What trains, for which loss."""
