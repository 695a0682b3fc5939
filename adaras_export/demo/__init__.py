"""The whole job on a model that is at hand: an embedded synthetic one, or SmolLM2 from its PyPI wheel."""
