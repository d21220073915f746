"""Rows of bases whose tokenizer has tokens for coordinates: each is one token, and answers come back from the ids."""

from pathlib import Path

import pytest
from PIL import Image
from tokenizers import AddedToken

from ray_vlm.config.schema import Model
from ray_vlm.config.task import DetectionTask
from ray_vlm.data.records import SftRecord
from ray_vlm.data.samples import SampleBuilder, parse_answer
from ray_vlm.data.spec import SampleSpec
from ray_vlm.demo.tiny import write_untrained
from ray_vlm.errors import DataError
from tests.unit.tasks.test_codecs import CAT, DOG, LABELS, SIZE, TEXTS

_ADDED = {  # as the processors of the families add them: PaliGemma's are not special, InternVL's are
    "paligemma": [AddedToken(f"<loc{i:04d}>") for i in range(1024)],
    "internvl": [AddedToken(token, special=True) for token in ("<ref>", "</ref>", "<box>", "</box>")],
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Tiny bases with the tokens of each family, and one without."""
    from transformers import AutoTokenizer

    root = tmp_path_factory.mktemp("codecs")
    made = {}
    for name, tokens in (*_ADDED.items(), ("none", [])):
        made[name] = str(write_untrained(root / name))
        tokenizer = AutoTokenizer.from_pretrained(made[name])
        tokenizer.add_tokens(tokens)
        tokenizer.save_pretrained(made[name])
    return made


def _builder(folder: str, codec: str) -> SampleBuilder:
    task = DetectionTask(codec=codec)  # type: ignore[arg-type]
    return SampleBuilder(SampleSpec(Model(name=folder, load_in_4bit=False), task, LABELS, kind="answer"))


@pytest.mark.parametrize("codec", list(_ADDED))
def test_answers_come_back_from_the_ids(codec: str, folders: dict[str, str], tmp_path: Path) -> None:
    Image.new("RGB", SIZE, "green").save(tmp_path / "a.png")
    truth = {"boxes": (DOG, CAT), "labels": LABELS}
    record = SftRecord("1", 0, (str(tmp_path / "a.png"),), (SIZE,), truth)
    builder = _builder(folders[codec], codec)
    assert builder.problem(record) is None
    row = builder.train_row(record)
    ids = [int(token) for token in row.labels if token >= 0]
    assert builder.text(ids) == TEXTS[codec]
    known = {token.content for token in _ADDED[codec]}
    tokens = [token for token in builder.tokenizer.convert_ids_to_tokens(ids) if token in known]
    assert len(tokens) == 8  # two boxes of four coordinates, or two times two pairs of tags
    assert parse_answer(builder.text(ids), record, builder).ok


@pytest.mark.parametrize("codec", list(_ADDED))
def test_a_base_without_the_tokens_cannot_be_set_to_them(codec: str, folders: dict[str, str]) -> None:
    with pytest.raises(DataError, match=rf"task\.codec='{codec}'.*does not have"):
        _builder(folders["none"], codec)
