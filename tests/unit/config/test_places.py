"""Relative paths of a job: looked for in the current folder, then beside the job file, both named in errors."""

import sys
from pathlib import Path

import pytest

from ray_vlm.cluster.environment import Environment, read_environment
from ray_vlm.config import paths
from ray_vlm.config.data import Source
from ray_vlm.config.load import load_job
from ray_vlm.config.paths import absolute_paths, import_function
from ray_vlm.data.sources.creation import prepare_source
from ray_vlm.data.sources.files import find_files
from ray_vlm.data.sources.tables import read_table
from ray_vlm.errors import ConfigError, DataError
from ray_vlm.methods.rewards import load_rewards
from ray_vlm.models.lora import check_adapter


@pytest.fixture
def job_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job in a folder of its own, run from another; what the tests import is forgotten again."""
    for folder in ("here", "jobs"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(Path.cwd()))])
    monkeypatch.setattr(paths, "_job_folder", None)
    path = tmp_path / "jobs" / "job.yaml"
    sources = "train: {path: rows.json, image_root: photos}, eval: {path: gone.json}, mix: [{path: more.json}]"
    path.write_text(f"model: {{name: base, adapter: trained}}\ndata: {{{sources}}}\n")
    return path


def test_files_are_looked_for_here_and_then_beside_the_job(job_file: Path) -> None:
    beside = job_file.parent
    for name in ("rows.json", "more.json"):
        (beside / name).write_text("{}")
    Path("rows.json").write_text("{}")
    for folder in (Path("photos"), beside / "base"):
        folder.mkdir()
    job = load_job(job_file)
    assert (job.data.train.path, job.data.train.image_root) == ("rows.json", "photos"), "the current folder comes first"
    assert job.data.mix[0].path == str(beside / "more.json")
    assert job.model.name == str(beside / "base")
    absolute = absolute_paths(job)
    assert absolute.data.train.path == str(Path("rows.json").absolute())
    for gone in (job.data.eval.path, absolute.data.eval.path):
        with pytest.raises(DataError, match="no such file") as error:
            read_table(gone)
        assert f"looked for in {Path.cwd()} and in {beside}, beside the job file" in str(error.value)
    with pytest.raises(Exception, match=r"no adapter here.*beside the job file"):
        check_adapter("trained", "base", "base")
    with pytest.raises(DataError) as error:
        read_table("/nowhere/gone.json")
    assert "beside the job file" not in str(error.value), "it was given as an absolute path"


def test_patterns_and_lists_of_rows_are_looked_for_too(job_file: Path) -> None:
    beside, here = job_file.parent, Path.cwd()
    for folder, name in ((beside, "shards/a-1.jsonl"), (beside, "only[1]/b.jsonl"), (here, "parts/c.csv")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")
    cases = {
        "shards/*.jsonl": beside / "shards" / "*.jsonl",
        "shards/a-{0..1}.jsonl": beside / "shards" / "a-{0..1}.jsonl",
        "only[1]/*.jsonl": beside / "only[1]" / "*.jsonl",
        "parts/*.csv": here / "parts" / "*.csv",
        "nowhere/*.csv": here / "nowhere" / "*.csv",
        "gs://bucket/*.csv": "gs://bucket/*.csv",
    }
    job = load_job(job_file, [f"data.train.path={list(cases)}"])
    assert absolute_paths(job).data.train.paths == tuple(map(str, cases.values()))
    with pytest.raises(DataError, match=r"no file matches.*It was looked for in .*beside the job file"):
        find_files(Source(path="nowhere/*.csv"))


@pytest.mark.parametrize(
    ("override", "paths"),
    [
        ("data.train.path=[a.jsonl,b.jsonl]", ("a.jsonl", "b.jsonl")),
        ("data.train.path=shards/*.parquet", ("shards/*.parquet",)),
        ("data.train.path=*.parquet", ("*.parquet",)),
        ("data.train.path=part-{000..127}.parquet", ("part-{000..127}.parquet",)),
    ],
)
def test_the_command_line_takes_lists_and_patterns(job_file: Path, override: str, paths: tuple[str, ...]) -> None:
    train = load_job(job_file, [override]).data.train
    assert train is not None
    assert train.paths == paths


@pytest.mark.parametrize("value", ["[1, 2]", "5", "[]", "[[a.csv]]"])
def test_a_path_of_another_kind_is_one_problem(job_file: Path, value: str) -> None:
    with pytest.raises(ConfigError, match=r"`data\.train\.path` is .*should be a path, or a list of at least") as error:
        load_job(job_file, [f"data.train.path={value}"])
    assert len(error.value.problems) == 1


def test_a_data_set_on_the_hub_keeps_its_name(job_file: Path) -> None:
    (job_file.parent / "rows").mkdir()
    (job_file.parent / "rows" / "own").write_text("")
    names = ["someone/data-set", "rows/own", "rows/missing.csv", "rows/missing.jsonl.gz"]
    job = load_job(job_file, [f"data.train.path={names}", "data.train.image_root=some/photos"])
    here = Path.cwd()
    absolute = absolute_paths(job)
    assert absolute.data.train.paths == (
        "someone/data-set",
        str(job_file.parent / "rows" / "own"),
        *(str(here / name) for name in names[2:]),
    )
    assert absolute.data.train.image_root == str(here / "some" / "photos")
    assert absolute_paths(absolute) == absolute
    made = load_job(job_file, ["data.train={path: some/rows, create: my:f}"])
    assert absolute_paths(made).data.train.path == str(here / "some" / "rows"), "a function makes it here"


def test_absolute_paths_stay_as_they_are(job_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("base").mkdir()
    job = load_job(job_file, ["model.name=base", "train.vision_cache=~/cache", "data.test={path: 'gs://b/rows.json'}"])
    absolute, here = absolute_paths(job), Path.cwd()
    assert (absolute.model.name, absolute.model.adapter) == (str(here / "base"), "trained"), (
        "the adapter may be on the hub"
    )
    assert absolute.data.train.image_root == str(here / "photos")
    assert absolute.data.mix[0].path == str(here / "more.json")
    assert absolute.data.test.path == "gs://b/rows.json"
    assert absolute.train.vision_cache == str(Path.home() / "cache")
    assert absolute.run.output_dir == str(here / "outputs")
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert absolute_paths(absolute) == absolute, "a run in a Ray job makes them absolute again"
    with pytest.raises(ConfigError, match=r"run.output_dir='outputs' is relative, and a Ray job"):
        absolute_paths(job)


def test_a_folder_that_is_both_is_named_once(job_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(job_file.parent)
    for path in (job_file, Path("job.yaml"), Path("../jobs/job.yaml")):
        job = load_job(path)
        assert job.data.eval is not None
        with pytest.raises(DataError) as error:
            read_table(job.data.eval.path)
        assert f"It was looked for in {Path.cwd()}: give a path relative to it, or an absolute one" in str(error.value)
        with pytest.raises(ModuleNotFoundError) as missing:
            import_function("nowhere_mine:f")
        assert f"looked for in {Path.cwd()} and among the installed packages. A function" in str(missing.value)


def test_functions_are_looked_for_here_and_then_beside_the_job(job_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beside = job_file.parent
    Path("both_mine.py").write_text("def f(**kwargs): return 'here'\n")
    (beside / "both_mine.py").write_text("def f(**kwargs): return 'beside'\n")
    (beside / "beside_mine.py").write_text("def f(path): open(path, 'w').write('{}')\n")
    (beside / "broken_mine.py").write_text("import surely_not_there\n")
    for name in ("both_mine", "beside_mine", "broken_mine"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    job = load_job(job_file, ["data.train.create=beside_mine:f"])
    assert import_function("both_mine:f")() == "here"
    prepare_source(job.data.train)
    assert Path("rows.json").exists()
    with pytest.raises(ConfigError) as error:
        load_rewards("chat", {"nowhere_mine:f": 1.0, "broken_mine:f": 1.0})
    gone, broken = error.value.problems
    assert f"looked for in {Path.cwd()}, among the installed packages and in {beside}" in gone
    assert "is named my_code:function" in gone
    assert "No module named 'surely_not_there'" in broken


def test_a_worker_looks_beside_the_job_too(job_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (job_file.parent / "worker_mine.py").write_text("def f(): return 1\n")
    monkeypatch.delitem(sys.modules, "worker_mine", raising=False)
    load_job(job_file)
    environment = read_environment()
    paths.use_job_folder(None)  # as a process that has read no job
    with pytest.raises(ModuleNotFoundError):
        import_function("worker_mine:f")
    environment.apply()
    assert import_function("worker_mine:f")() == 1
    Environment(job_folder=str(tmp_path / "on another machine")).apply()
    assert paths.job_folder() == str(job_file.parent)
