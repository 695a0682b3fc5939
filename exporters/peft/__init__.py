"""Adapters for PEFT."""
