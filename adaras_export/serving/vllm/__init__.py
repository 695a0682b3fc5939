"""A plugin that serves `hf` and `hf-thin` exports in vLLM with the whole rule: gate, start, and dials per request.

vLLM finds it by the entry point `vllm.general_plugins` and runs `register` in each of its processes. Steered models run
in vLLM's own classes: no code of a repository is run, and vLLM is neither changed on disk nor made eager.
"""

from adaras_export.serving.vllm.plugin import register

__all__ = ["register"]
