"""Low-bit arithmetic, one folder per operation: a reference in plain torch, and what is faster."""
