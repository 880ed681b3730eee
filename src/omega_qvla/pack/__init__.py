"""The quantized checkpoint on disk: a directory of safetensors and JSON (docs/checkpoint-format.md)."""
