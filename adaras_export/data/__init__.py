"""Questions, checkers of answers, the sandbox, and traces sampled from a model."""
