"""Models and tasks of the demo: an embedded synthetic model, or SmolLM2 from its PyPI wheel."""
