"""Values: rule, neurons, gate, traces, base model, checkpoint, intervals. Importing them loads no torch."""
