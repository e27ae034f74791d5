"""Models in the formats of other programs: transformers, llama.cpp, ONNX."""
