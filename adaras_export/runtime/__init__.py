"""The payload that is copied byte for byte into exported repositories.

Ordinary linted, typed and tested code that imports torch, transformers and its own siblings only.
"""
