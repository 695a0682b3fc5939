"""Models at hand, with questions to try the whole job on."""

from adaras_export.demo.planted import MODEL, questions

__all__ = ["MODEL", "questions"]
