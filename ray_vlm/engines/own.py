"""The package's own engine: it answers by the model that the process has, which may be the one that trains.

Answers are written by this package's loop (`decoding.py`, `sampling.py`); greedy ones by transformers' `generate`
for families that the package does not know, and under ZeRO-3.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

from ray_vlm.data.collate import collate
from ray_vlm.data.samples import SampleBuilder
from ray_vlm.data.spec import Sample
from ray_vlm.engines.arithmetic import answering
from ray_vlm.engines.decoding import decode_greedy, end_ids
from ray_vlm.engines.interface import Completion, Engine, Pixels, Sampling
from ray_vlm.engines.portions import PortionWords, in_portions
from ray_vlm.engines.sampling import sample_groups
from ray_vlm.models.backbone import base_of, evaluation_mode
from ray_vlm.models.card_memory import release_memory
from ray_vlm.models.families import FAMILIES

if TYPE_CHECKING:
    import torch
    from torch.nn import Module


class OwnEngine(Engine):
    """Answers by a model of this process, which stays as it is.

    `group_batch`: how many prompts are sampled at a time, `answer_batch`: how many are answered greedily at a time
    (None: all of a call). Each is halved, and kept, when a GPU runs out of memory. `keys`: the settings of how many
    answers a prompt has and how long they are, for messages.
    """

    def __init__(
        self,
        model: "Module",
        builder: SampleBuilder,
        device: str,
        group_batch: int | None = None,
        keys: tuple[str, str] = ("method.num_generations", "method.max_completion_tokens"),
    ):
        self.model, self.builder, self.device, self._keys = model, builder, device, keys
        self.group_batch = group_batch
        self.answer_batch: int | None = None

    def update(self, model: "Module") -> None:
        """Answer by `model` itself."""
        self.model = model

    def sample(
        self,
        rows: Sequence[Sample],
        sampling: Sampling,
        seeds: Sequence[Sequence[int]],
        pixels: Pixels | None = None,
    ) -> list[list[Completion]]:
        """Sample as `Engine` says. Raise `RunError` if the answers to one prompt do not fit into the GPU's memory."""
        groups = self._sample(rows, sampling, seeds, pixels, 0)
        if self.group_batch is not None:  # there is little room: what sampling has reserved is given back
            release_memory()
        return groups

    def try_sampling(
        self,
        rows: Sequence[Sample],
        sampling: Sampling,
        seeds: Sequence[Sequence[int]],
        pixels: Pixels | None,
        reserved_bytes: int,
    ) -> int:
        """Sample for the memory alone, while `reserved_bytes` of the device are held for each prompt that is sampled
        at a time. Return how many are."""
        self._sample(rows, sampling, seeds, pixels, reserved_bytes)
        return self.group_batch or len(rows)

    def _sample(
        self,
        rows: Sequence[Sample],
        sampling: Sampling,
        seeds: Sequence[Sequence[int]],
        pixels: Pixels | None,
        reserved_bytes: int,
    ) -> list[list[Completion]]:
        import torch

        def run(portion: int | None) -> list[list[Completion]]:
            held = torch.empty(reserved_bytes * (portion or len(rows)), dtype=torch.uint8, device=self.device)
            groups = sample_groups(self.model, rows, self.builder, sampling, seeds, self.device, portion, pixels)
            del held
            return groups

        can_halve, words = not _is_partitioned(self.model), _sampling_words(sampling, self._keys)
        groups, self.group_batch = in_portions(run, len(rows), self.group_batch, can_halve, words)
        return groups

    def answer(self, rows: Sequence[Sample], max_new_tokens: int) -> list[list[int]]:
        """Answer as `Engine` says. Modules keep their train or eval mode.

        Raise `RunError` if the answer to one prompt, or under ZeRO-3 those to all, do not fit into the GPU's memory."""
        import torch

        tokens_of = generate_greedy if needs_generate(self.builder) else decode_greedy

        def run(portion: int | None) -> list[list[int]]:
            answers: list[list[int]] = []
            for start in range(0, len(rows), portion or len(rows)):
                batch = rows[start : start + portion] if portion else rows
                tokens = max(len(row.input_ids) for row in batch) + max_new_tokens
                with torch.inference_mode(), answering(self.model, self.device, len(batch), tokens):
                    answers += tokens_of(self.model, batch, self.builder, max_new_tokens, self.device)
            return answers

        if not rows:
            return []
        can_halve, words = not _is_partitioned(self.model), _answer_words(max_new_tokens)
        with evaluation_mode(self.model):
            answers, self.answer_batch = in_portions(run, len(rows), self.answer_batch, can_halve, words)
        return answers


def needs_generate(builder: SampleBuilder) -> bool:
    """Return whether greedy answers come from transformers' `generate`: for families that this package does not know,
    whose caches and masks may be of any kind, and under ZeRO-3, where all ranks must run the model until the last of
    them has answered."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    return builder.family.model_type not in FAMILIES or is_deepspeed_zero3_enabled()


def generate_greedy(
    model: "Module", rows: Sequence[Sample], builder: SampleBuilder, max_new_tokens: int, device: str
) -> list[list[int]]:
    """Generate the new tokens of each prompt row greedily by transformers' `generate`."""
    batch = collate(rows, builder, device, side="left")
    generate = cast("Callable[..., torch.Tensor]", model.generate)  # of `GenerationMixin`, which each family adds
    ends = end_ids(base_of(model), builder)
    tokens = generate(
        **{k: v for k, v in batch.items() if k != "labels"},
        max_new_tokens=max_new_tokens,
        do_sample=False,
        repetition_penalty=1.0,  # that of a hub model would penalise repeated digits and labels
        use_cache=True,
        eos_token_id=ends,
        pad_token_id=builder.tokenizer.pad_token_id,
    )
    answers = tokens[:, batch["input_ids"].shape[1] :].tolist()  # `generate` returns prompt and answer, [rows, tokens]
    # After its end a row is padded.
    return [ids[: next((i + 1 for i, token in enumerate(ids) if token in ends), None)] for ids in answers]


def _sampling_words(sampling: Sampling, keys: tuple[str, str]) -> PortionWords:
    number, length = keys
    advice = (
        f"Lower {number} (now {sampling.num_generations}), {length} (now {sampling.max_new_tokens}) or "
        "data.max_pixels, set model.load_in_4bit, or use a larger card."
    )
    return PortionWords("sampling the answers to", ", with the same random numbers", advice, advice)


def _answer_words(max_new_tokens: int) -> PortionWords:
    tokens = f"evaluate.max_new_tokens (now {max_new_tokens})"
    end = "data.max_pixels, set model.load_in_4bit, or use a larger card."
    return PortionWords("answering", "", f"Lower {tokens} or {end}", f"Lower evaluate.batch_size, {tokens} or {end}")


def _is_partitioned(model: "Module") -> bool:
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())
