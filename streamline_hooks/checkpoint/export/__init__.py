"""Export models for other engines: plain checkpoints, GGUF and ONNX."""
