"""Custom code that `from_pretrained` loads: the whole rule."""
