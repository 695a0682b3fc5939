"""Frozen values: rule, neurons, gate, traces, base model, checkpoint, intervals. Imports no torch."""
