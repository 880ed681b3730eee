"""Quantization mathematics: pure functions of tensors, one implementation of each formula.

Notation: activation X [tokens, in], weight W [out, in] as torch stores it, y = X Wᵀ.
"""
