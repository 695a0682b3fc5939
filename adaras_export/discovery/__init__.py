"""From traces to neurons and gate."""
