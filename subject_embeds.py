"""A subject, encoded: what `encode_subject` returns and the pipelines' `subject` argument takes."""

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class SubjectEmbeds:
    r"""
    A subject that was picked out of a picture, ready to be drawn any number of times without encoding it again.

    Args:
        embeds (`torch.Tensor` of shape `(1, num_subject_tokens, cross_attention_dim)`):
            The subject's tokens, for the conditional branch.
        negative_embeds (`torch.Tensor` of the same shape):
            The tokens of nothing (an empty query on an all-zeros picture), for the unconditional branch of
            classifier-free guidance.
        scale (`float`, *optional*):
            How strongly this subject acts, usually 0.5 to 0.8. Without it, the scale of the call or of `set_ssr_scale`
            holds.

    Example:

    ```py
    >>> subject = pipe.encode_subject(photo, query="cat")
    >>> images = [pipe(prompt, subject=subject.scaled(0.8)).images[0] for prompt in prompts]
    ```
    """

    embeds: torch.Tensor
    negative_embeds: torch.Tensor
    scale: float | None = None

    def scaled(self, scale: float) -> "SubjectEmbeds":
        r"""
        The same subject, more or less strongly drawn.

        Args:
            scale (`float`):
                0 leaves the subject out, 1 draws it as strongly as the prompt.

        Returns:
            [`SubjectEmbeds`] with that scale.

        Raises:
            `ValueError`: if `scale` is not a number.
        """
        return replace(self, scale=check_scale("scale", scale))


def check_scale(name: str, scale) -> float:
    """`scale` as a float; a `ValueError` that names the argument `name` if it is not a finite number."""
    number = isinstance(scale, (int, float)) and not isinstance(scale, bool)
    if not number or not abs(scale) < float("inf"):
        raise ValueError(f"`{name}` has to be a number, usually from 0 to 1, but is {scale!r}.")
    return float(scale)
