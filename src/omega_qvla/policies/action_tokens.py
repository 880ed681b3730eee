"""Actions that a language model says in tokens, so that gradients can be taken of them."""

from __future__ import annotations

from torch import Tensor


def expected_actions(logits: Tensor, tokens: Tensor, values: Tensor) -> Tensor:
    """Normalized actions that action tokens stand for on average, float32 [B, 1, D].

    Decoding takes the likeliest token, which has no gradient. The mean over the distribution of the action tokens
    has one, and is the decoded action where the distribution is sharp.

    `logits` [B, D, vocabulary]: of the D positions at which an action's tokens are said. `tokens` int64 [bins]: the
    ids of the action tokens. `values` [bins]: what each stands for.

    Raises `ValueError` if there is not one value for each token.
    """
    if tokens.shape != values.shape or tokens.dim() != 1:
        raise ValueError(f"tokens {list(tokens.shape)} and values {list(values.shape)} are not one for one")
    probabilities = logits[..., tokens].float().softmax(-1)
    return (probabilities @ values.to(probabilities))[:, None]
