"""Lay out a conversation by the base's chat template, and split it around the assistant's texts."""

from collections.abc import Sequence

from ray_vlm.errors import ModelError
from ray_vlm.models.processor import Render
from ray_vlm.tasks.answers import IMAGE, Turns

MARK = "\x00"  # stands for an assistant's text while a conversation is laid out


def mark_answers(turns: Turns) -> Turns:
    """Replace each assistant's text by a mark, since it does not change the layout of the rest."""
    return tuple((role, MARK if role == "assistant" else text) for role, text in turns)


def lay_out(turns: Turns, render: Render) -> tuple[list[str], str]:
    """Return the text before each assistant's text, including an answer to the last turn, and the text that closes
    them.

    `turns`: the result of `mark_answers`. Raise `ModelError` if the template does not keep this order.
    """
    messages = [{"role": role, "content": _parts(text)} for role, text in turns]
    prompt = render(messages, True)
    conversation = render([*messages, {"role": "assistant", "content": _parts(MARK)}], False)
    pieces = conversation.split(MARK)
    if not conversation.startswith(prompt) or len(pieces) != 2 + sum(role == "assistant" for role, _ in turns):
        raise ModelError(
            "the base's chat template renders an answer that does not continue its own prompt, so the two cannot be "
            "separated. Mend the template, or use another base."
        )
    close = pieces.pop()
    if not all(piece.startswith(close) for piece in pieces[1:]):
        raise ModelError(
            "the base's chat template closes an earlier answer differently from the last one, so answers cannot be "
            "located in it. Mend the template, or use another base."
        )
    return [pieces[0], *(piece[len(close) :] for piece in pieces[1:])], close


def check_images(heads: Sequence[str], turns: Turns, image_token: str) -> None:
    """Raise `ValueError` if the template writes another number of images than the turns have."""
    written = sum(head.count(image_token) for head in heads)
    wanted = sum(text.count(IMAGE) for _, text in turns)
    if written != wanted:
        raise ValueError(
            f"the base's chat template writes {written} images ({image_token}) for {wanted}; use the template that its "
            "publisher gives for images, or another base"
        )


def expand_images(heads: Sequence[str], image_token: str, expansions: Sequence[str]) -> list[str]:
    """Replace each image placeholder by its expansion, in order."""
    remaining = iter(expansions)
    pieces = [head.split(image_token) for head in heads]
    return [first + "".join(next(remaining) + more for more in rest) for first, *rest in pieces]


def _parts(text: str) -> list[dict[str, str]]:
    """Return a turn's text as the chat template takes it, with `<image>` tags as images."""
    parts: list[dict[str, str]] = []
    for number, piece in enumerate(text.split(IMAGE)):
        if number:
            parts.append({"type": "image"})
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts
