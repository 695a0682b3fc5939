"""A checkpoint of a stock architecture, steered at every token."""
