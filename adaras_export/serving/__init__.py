"""What servers load to run steered models."""
