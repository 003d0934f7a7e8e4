"""Merges similar tokens, for fewer tokens with nearly the same attention."""

import torch


def merge_tokens(
    embeds: torch.Tensor, counts: torch.Tensor | None, num_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    Merge the most similar tokens until `num_tokens` are left. A merged token is the mean of the tokens that it replaces, and
    counts as many times in the softmax. Keys and values are linear in the tokens, so merging equal tokens changes nothing. Each
    step merges the pair that increases the squared error least (Ward's criterion).

    Args:
        embeds (`torch.Tensor` of shape `(1, length, width)`):
            A subject's tokens.
        counts (`torch.Tensor` of shape `(1, length)`, *optional*):
            How many tokens each of them already replaces; one by default.
        num_tokens (`int`):
            The number of tokens to keep.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: tokens `(1, num_tokens, width)` and counts `(1, num_tokens)`.
    """
    tokens = embeds[0].detach().double().cpu()
    weights = (
        torch.ones(len(tokens), dtype=torch.float64, device="cpu") if counts is None else counts[0].double().cpu()
    )
    cost = _cost(tokens, weights, tokens, weights)
    cost.fill_diagonal_(torch.inf)
    alive = torch.ones(len(tokens), dtype=torch.bool, device="cpu")
    for _ in range(len(tokens) - num_tokens):
        first, second = divmod(int(cost.argmin()), len(tokens))
        total = weights[first] + weights[second]
        tokens[first] = (weights[first] * tokens[first] + weights[second] * tokens[second]) / total
        weights[first] = total
        alive[second] = False
        cost[second], cost[:, second] = torch.inf, torch.inf
        row = _cost(tokens[[first]], weights[[first]], tokens, weights)[0]
        row[~alive], row[first] = torch.inf, torch.inf
        cost[first], cost[:, first] = row, row
    return tokens[alive][None].to(embeds), weights[alive][None].to(embeds.device, torch.float32)


def _cost(
    first: torch.Tensor, first_weights: torch.Tensor, second: torch.Tensor, second_weights: torch.Tensor
) -> torch.Tensor:
    """Ward's criterion for each pair."""
    shared = first_weights[:, None] * second_weights / (first_weights[:, None] + second_weights)
    return shared * torch.cdist(first, second).square()
