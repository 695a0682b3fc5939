"""Reads untrusted files, writes files atomically, and talks to the Hub. Knows no models."""
