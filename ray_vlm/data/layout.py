"""What the base's chat template puts around the assistant's words."""

from collections.abc import Sequence

from ray_vlm.errors import ModelError
from ray_vlm.models.prompt_text import Render
from ray_vlm.tasks.answers import IMAGE, Turns

MARK = "\x00"  # stands for an assistant's words while a conversation is laid out


def mark_answers(turns: Turns) -> Turns:
    """The turns with a mark for each of the assistant's, whose words do not change how the rest is laid out."""
    return tuple((role, MARK if role == "assistant" else text) for role, text in turns)


def lay_out(turns: Turns, render: Render) -> tuple[list[str], str]:
    """The text before each assistant's words, an answer to the last turn included, and the text that closes such words.

    `turns`: as `mark_answers` gives them. Raises `ModelError` for a template that does not keep to that order.
    """
    messages = [{"role": role, "content": _parts(text)} for role, text in turns]
    prompt = render(messages, True)
    whole = render([*messages, {"role": "assistant", "content": _parts(MARK)}], False)
    pieces = whole.split(MARK)
    if not whole.startswith(prompt) or len(pieces) != 2 + sum(role == "assistant" for role, _ in turns):
        raise ModelError(
            "the base's chat template renders an answer that does not continue its own prompt, so the two cannot be "
            "told apart. Mend the template, or use another base."
        )
    close = pieces.pop()
    if not all(piece.startswith(close) for piece in pieces[1:]):
        raise ModelError(
            "the base's chat template closes an earlier answer otherwise than the last one, so answers cannot be found "
            "in it. Mend the template, or use another base."
        )
    return [pieces[0], *(piece[len(close) :] for piece in pieces[1:])], close


def check_images(heads: Sequence[str], turns: Turns, image_token: str) -> None:
    """Raise `ValueError` where the template has written another number of images than the turns have."""
    written = sum(head.count(image_token) for head in heads)
    wanted = sum(text.count(IMAGE) for _, text in turns)
    if written != wanted:
        raise ValueError(
            f"the base's chat template writes {written} images ({image_token}) for {wanted}; use the template that its "
            "publisher gives for images, or another base"
        )


def expand_images(heads: Sequence[str], image_token: str, expansions: Sequence[str]) -> list[str]:
    """The texts with what stands for each image, in their order, in place of its placeholder."""
    given = iter(expansions)
    pieces = [head.split(image_token) for head in heads]
    return [first + "".join(next(given) + more for more in rest) for first, *rest in pieces]


def _parts(text: str) -> list[dict[str, str]]:
    """A turn's text as the chat template takes it, `<image>` tags as images."""
    parts: list[dict[str, str]] = []
    for number, piece in enumerate(text.split(IMAGE)):
        if number:
            parts.append({"type": "image"})
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts
