"""Reads what others wrote, writes whole files or none, and talks to the Hub. Knows no models."""
