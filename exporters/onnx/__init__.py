"""A graph with the rule inside, for ONNX Runtime and the web."""
