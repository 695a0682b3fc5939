"""Runs code of models without rights, in a process of its own."""
