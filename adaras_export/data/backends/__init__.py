"""Where answers come from: a model in this process, a server, vLLM."""
