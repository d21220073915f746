"""Reading a job: defaults, overrides, and all problems together with their locations."""

from pathlib import Path

import pytest

from ray_vlm.config.data import Window
from ray_vlm.config.load import dump_job, fill_defaults, load_job, load_resolved
from ray_vlm.config.resume import check_resume, keep_shuffle
from ray_vlm.errors import ConfigError

GOOD = "model: {name: x}\ndata: {train: {path: a.json}}\n"


def _load(tmp_path: Path, text: str, *overrides: str):
    path = tmp_path / "job.yaml"
    path.write_text(text)
    return load_job(path, overrides)


def _problems(tmp_path: Path, text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as error:
        _load(tmp_path, text, *overrides)
    return error.value.problems


def test_short_forms_defaults_and_round_trip(tmp_path: Path) -> None:
    job = _load(tmp_path, "method: sft\ntask: detection\n" + GOOD)
    assert (job.method.name, job.task.name, job.lora.rank, job.model.load_in_4bit) == ("sft", "detection", 16, True)
    assert load_resolved(dump_job(job)) == job


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("model.load_in_4bit=false", lambda j: j.model.load_in_4bit is False),
        ("train.bf16=false", lambda j: j.train.precision == "fp32"),
        ("train.gradient_checkpointing=false", lambda j: j.train.gradient_checkpointing is False),
        ("train.learning_rate=2e-4", lambda j: j.train.learning_rate == 2e-4),
        ("train.learning_rate=1E5", lambda j: j.train.learning_rate == 1e5),
        ("lora.target=[language, vision]", lambda j: j.lora.target == ["language", "vision"]),
        ("method.loss_on=whole_sequence", lambda j: j.method.loss_on == "whole_sequence"),
        ("method.trl.neftune_noise_alpha=5", lambda j: j.method.trl == {"neftune_noise_alpha": 5}),
        ("run.name=null", lambda j: j.run.name is None),
    ],
)
def test_overrides_win_over_the_file(tmp_path: Path, override: str, read) -> None:
    text = GOOD + "method: sft\ntrain: {bf16: true, gradient_checkpointing: true}\nrun: {name: x}\n"
    assert read(_load(tmp_path, text, override))


@pytest.mark.parametrize(("old", "precision"), [(True, "bf16"), (False, "fp32")])
def test_the_old_form_of_precision_says_the_same(tmp_path: Path, old: bool, precision: str) -> None:
    job = _load(tmp_path, GOOD + f"train: {{bf16: {str(old).lower()}}}\n")
    assert job == _load(tmp_path, GOOD + f"train: {{precision: {precision}}}\n")
    assert load_resolved(dump_job(job)) == job
    of_earlier = dump_job(job)
    of_earlier["train"] = {k: v for k, v in of_earlier["train"].items() if k != "precision"} | {"bf16": old}
    assert check_resume(fill_defaults(of_earlier), dump_job(job)) == [], "a run of an earlier version goes on"
    other = _load(tmp_path, GOOD + "train: {precision: fp16}\n")
    assert "train.precision" in check_resume(fill_defaults(of_earlier), dump_job(other))[0]


def test_a_resumed_run_may_sample_elsewhere(tmp_path: Path) -> None:
    """As the messages on a server that is away, or an engine that differs, say."""
    text = GOOD + "method: {name: grpo}\n"
    job, server = _load(tmp_path, text), ["method.rollouts=server", "method.sampler_url=http://a:1/v1"]
    moved = [server[0], "method.sampler_url=http://b:2/v1", "method.max_rollout_gap=0.2", "method.samplers=0"]
    answers = ["evaluate.engine=server", "evaluate.sampler_url=http://a:1/v1"]
    target = "lora.target=[language]"
    first = dump_job(_load(tmp_path, text, *server, target))
    for overrides in (moved, ["method.rollouts=vllm"], [], answers):
        assert check_resume(first, dump_job(_load(tmp_path, text, *overrides, target))) == []
    assert (
        "method.temperature" in check_resume(dump_job(job), dump_job(_load(tmp_path, text, "method.temperature=2")))[0]
    )


def test_names_of_one_s_own_are_keys(tmp_path: Path) -> None:
    names = ["toe-drain", "deep hole", "5.5 inch", "driver's"]
    words = ["toe-drain=7", "deep hole=2", '"5.5 inch"=0.5', "driver's=1.5"]
    job = _load(tmp_path, GOOD + "task: {labels: [a]}\n", *(f"data.oversample.{word}" for word in words))
    assert job.data.oversample == dict(zip(names, (7, 2, 0.5, 1.5), strict=True))
    text = GOOD.replace("}}", "}, oversample: auto, test: 0.1}")
    (problem,) = _problems(tmp_path, text, "data.oversample.toe-drain=7")
    assert "`data.oversample` is 'auto', not a section" in problem
    assert "Give all of it: data.oversample={toe-drain: ...}" in problem
    assert _load(tmp_path, text, "data.test.ratio=0.2").data.test.ratio == 0.2
    assert any("and not both" in problem for problem in _problems(tmp_path, text, "data.test.path=b.json"))


def test_an_id_may_be_written_as_a_number(tmp_path: Path) -> None:
    text = "model: {name: x}\ntask: gui_steps\ndata: {train: {path: a.csv, format: gui_csv, task_start: 1}}\n"
    job = _load(tmp_path, text, "data.train.task_end=20")
    assert job.data.train is not None
    assert (job.data.train.task_start, job.data.train.task_end) == ("1", "20")
    assert load_resolved(dump_job(job)) == job
    for wrong in ("true", "1.5", "[1]"):
        assert "`data.train.task_end` is" in _problems(tmp_path, text, f"data.train.task_end={wrong}")[0]


def test_all_problems_are_reported_together_with_location_and_fix(tmp_path: Path) -> None:
    text = (
        "model: {name: x, load_in_4bits: true}\n"
        "lora: null\n"
        "data:\n"
        "  train: {path: a.json}\n"
        "  trian: 3\n"
        "train: {num_epochs: two, global_batch_size: 0}\n"
        "evaluate: {metric: accuracy}\n"
    )
    problems = _problems(tmp_path, text, "nonsense", "train.learning_rate=fast")
    expected = [(":1:", "load_in_4bit`?"), (":5:", "Did you mean `train`"), (":6:", "'two'"), (":6:", "greater than")]
    expected += [(":7:", "f1_50"), ("model.load_in_4bit`: 4-bit weights cannot be trained", "load_in_4bit=false")]
    expected += [("'nonsense'", "section.key=value"), ("override 'train.learning_rate=fast'", "'fast'")]
    for location, words in expected:
        assert any(location in p and words in p for p in problems), (location, words, problems)
    assert len(problems) == len(expected)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: {name: x}\n", "`data` is missing"),
        ("- a\n- b\n", "a job is a mapping"),
        ("model: {name: x\n", "not valid YAML"),
        (GOOD + "train: {bf16: 1}\n", "should be a valid boolean"),
        (GOOD + "train: {bf16: true, precision: fp16}\n", "left out beside train.precision=fp16"),
        (GOOD + "train: {precision: float16}\n", "'fp16'"),
        (GOOD + "train: {bf16: true, bf16: false}\n", "set twice"),
        (GOOD + "method: ppo\n", "'sft'"),
        (GOOD + "lora: {target: []}\n", "at least 1 value"),
        (GOOD + "method: {name: sft, trl: {learning_rate: 1.0}}\n", "train.learning_rate"),
        (GOOD + "data: 3\n", "set twice"),
        (GOOD + "train: {learning_rate: .nan}\n", "learning_rate"),
    ],
)
def test_bad_jobs_are_refused(tmp_path: Path, text: str, words: str) -> None:
    assert any(words in p for p in _problems(tmp_path, text))


@pytest.mark.parametrize(
    "text",
    [
        GOOD + "seed: 2020-99-99\n",
        GOOD + "seed: 0x_\n",
        GOOD + "run: {name: !!binary /////w==}\n",
        GOOD + "train: {max_steps: " + "9" * 5000 + "}\n",
        GOOD + "lora: " + "[" * 5000 + "\n",
        GOOD + 'run: {name: "\\UFFFFFFFF"}\n',
        "model: &a {name: m, x: *a}\ndata: {}\n",
        "a: &a [x, x, x, x, x, x]\nb: &b [*a, *a, *a, *a, *a]\nc: &c [*b, *b, *b, *b]\nd: [*c, *c, *c]\n",
        GOOD + "1: a\nnull: b\n",
        GOOD + "seed: 4294967296\n",
        GOOD + "train: {num_epochs: .inf}\n",
        "",
        "--- a\n--- b\n",
        "\ufeff\t",
    ],
)
def test_odd_yaml_is_a_config_error(tmp_path: Path, text: str) -> None:
    assert _problems(tmp_path, text)


def test_a_bad_short_form_hides_no_other_problem(tmp_path: Path) -> None:
    text = GOOD + "method: ppo\nlora: {target: [foo]}\nrun: {name: a/b}\n"
    assert len(_problems(tmp_path, text)) == 3


def test_an_override_replaces_the_file_s_value_and_its_location(tmp_path: Path) -> None:
    (problem,) = _problems(tmp_path, GOOD + "train: {max_stps: 3}\n", "train={max_stps: 4}")
    assert problem.startswith("override 'train={max_stps: 4}'")


def test_missing_file_names_those_that_exist(tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text(GOOD)
    with pytest.raises(ConfigError, match=r"other\.yaml"):
        load_job(tmp_path / "job.yaml")


def test_a_share_of_the_training_rows_may_be_given_as_a_number(tmp_path: Path) -> None:
    job = _load(tmp_path, GOOD, "data.eval=0.1", "data.test={ratio: 0.2}")
    assert (job.data.eval.ratio, job.data.test.ratio, job.data.eval.path) == (0.1, 0.2, "")
    assert load_resolved(dump_job(job)) == job
    assert any("`data.eval.ratio` is 2" in problem for problem in _problems(tmp_path, GOOD, "data.eval=2"))


def test_a_source_needs_a_path(tmp_path: Path) -> None:
    assert any("each source needs a `path`" in p for p in _problems(tmp_path, "model: {name: x}\ndata: {train: {}}\n"))


def test_lists_of_names_and_sources_survive_the_way_to_the_workers(tmp_path: Path) -> None:
    text = GOOD + "task: {name: classification, regions: [[up], [down, below]]}\n"
    text = text.replace("a.json}", "a.csv, format: image_csv}, mix: [{path: b.csv, format: image_csv, weight: 0.5}]")
    job = _load(tmp_path, text)
    assert job.task.regions == (("up",), ("down", "below"))
    assert job.data.mix[0].weight == 0.5
    assert load_resolved(dump_job(job)) == job


def test_a_resumed_job_may_find_its_mixed_sources_elsewhere_but_not_others(tmp_path: Path) -> None:
    from ray_vlm.config.resume import check_resume

    def resolved(path: str, weight: float = 1.0) -> dict:
        return {"data": {"mix": [{"path": path, "weight": weight}]}}

    assert check_resume(resolved("/a/x.csv"), resolved("/b/x.csv")) == []
    assert "data.mix.0.path" in check_resume(resolved("/a/x.csv"), resolved("/a/y.csv"))[0]
    assert "data.mix.0.weight" in check_resume(resolved("/a/x.csv"), resolved("/a/x.csv", 2.0))[0]


def _laughs(form: str, levels: int = 12) -> str:
    """A line whose aliases stand for ten times as much at every level."""
    entries = ["a0: &a0 {x: 1}"]
    for i in range(1, levels):
        inner = ", ".join([f"*a{i - 1}"] * 10)
        entries.append({"list": f"a{i}: &a{i} [{inner}]", "merge": f"a{i}: &a{i} {{<<: [{inner}]}}"}.get(form, ""))
        if form == "same keys":
            entries[-1] = f"a{i}: &a{i} {{{', '.join([f'y: *a{i - 1}'] * 10)}}}"
        elif form == "keys":
            entries[-1] = f"? &a{i} [{inner}]\n: 1"
    return "{" + ", ".join(entries) + "}"


@pytest.mark.parametrize("form", ["list", "merge", "same keys", "keys"])
@pytest.mark.parametrize("where", ["file", "override"])
def test_aliases_that_stand_for_billions_of_values_are_refused_at_once(tmp_path: Path, form: str, where: str) -> None:
    if where == "file":
        problems = _problems(tmp_path, f"{GOOD}x: {_laughs(form)}\n")
        assert "more than 20000 values, aliases included" in problems[0]
    else:
        assert any("not valid YAML" in p for p in _problems(tmp_path, GOOD, f"method.trl={_laughs(form)}"))


@pytest.mark.parametrize("text", ["{a: " * 200 + "1" + "}" * 200, "[" * 300 + "]" * 300, "&a [*a]", "&a {b: *a}"])
def test_what_is_nested_too_deeply_for_a_job_is_refused(tmp_path: Path, text: str) -> None:
    assert "nested too deeply" in _problems(tmp_path, f"{GOOD}method: {{name: sft, trl: {{x: {text}}}}}\n")[0]
    assert "not valid YAML" in _problems(tmp_path, GOOD, f"method.trl.x={text}")[0]


def test_a_resolved_job_that_was_altered_is_a_config_error(tmp_path: Path) -> None:
    values = dump_job(_load(tmp_path, GOOD))
    with pytest.raises(ConfigError, match=r"the resolved job: `lora.rank` is 'x', but should be a valid integer"):
        load_resolved(values | {"lora": values["lora"] | {"rank": "x"}})


@pytest.mark.parametrize(
    ("text", "overrides", "shuffle"),
    [
        ("null", [], None),
        ("full", [], "full"),
        ("none", [], "none"),
        ("true", [], "full"),  # as earlier versions had it
        ("false", [], "none"),
        ("{window: 512}", [], Window(window=512)),
        ("null", ["data.shuffle.window=512"], Window(window=512)),
        ("full", ["data.shuffle.window=512"], Window(window=512)),
        ("{window: 2}", ["data.shuffle.window=512"], Window(window=512)),
        ("{window: 2}", ["data.shuffle=false"], "none"),
        ("{window: 2}", ["data.shuffle=null"], None),
    ],
)
def test_the_forms_of_the_shuffle(tmp_path: Path, text: str, overrides: list[str], shuffle: object) -> None:
    job = _load(tmp_path, f"{GOOD[:-2]}, shuffle: {text}}}\n", *overrides)
    assert job.data.shuffle == shuffle
    assert load_resolved(dump_job(job)) == job
    assert check_resume(fill_defaults(dump_job(job)), dump_job(job)) == []


@pytest.mark.parametrize(
    "text", ["sometimes", "1", "512", "{window: 1}", "{window: 2.5}", "{window: true}", "{rows: 9}", "{}", "[full]"]
)
def test_a_bad_shuffle_is_one_problem_with_the_forms(tmp_path: Path, text: str) -> None:
    problems = _problems(tmp_path, f"model: {{name: x}}\ndata:\n  train: {{path: a.json}}\n  shuffle: {text}\n")
    assert len(problems) == 1
    assert "job.yaml:4: `data.shuffle` is" in problems[0]
    assert "but should be full, none, or {window: N} with a whole number N from 2 on" in problems[0]
    assert "override" in _problems(tmp_path, GOOD, f"data.shuffle={text}")[0]


def test_a_resumed_job_without_a_shuffle_has_that_of_its_run(tmp_path: Path) -> None:
    """Also one of an earlier version, whose rows were all shuffled unless the job said `false`; the same word for it is
    no change, and another one is refused."""
    jobs = {text: _load(tmp_path, f"{GOOD[:-2]}, shuffle: {text}}}\n") for text in ("null", "full", "{window: 512}")}
    open_job, full, window = jobs.values()
    for old, kept in ((True, "full"), (False, "none"), ({"window": 512}, Window(window=512)), ("full", "full")):
        run = dump_job(open_job)
        run["data"]["shuffle"] = old
        assert check_resume(fill_defaults(run), dump_job(open_job)) == []
        assert keep_shuffle(run, open_job).data.shuffle == kept
        assert keep_shuffle(run, window) == window
        assert (check_resume(fill_defaults(run), dump_job(full)) == []) is (kept == "full")
    changed = check_resume(dump_job(window), dump_job(full))
    assert len(changed) == 1
    assert "`data.shuffle` was {'window': 512} and is now 'full'" in changed[0]
    del run["data"]["shuffle"]
    assert keep_shuffle(run, open_job).data.shuffle == "full"
    with pytest.raises(ConfigError, match=r"has data\.shuffle='x', which was altered"):
        keep_shuffle({"data": {"shuffle": "x"}}, open_job)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method.samplers=[2]", "`method.samplers` is [2], but should have at least 2 values. (Processes beside the"),
        ("method.samplers=[2,3,4]", "`method.samplers` is [2, 3, 4], but should have at most 2 values. ("),
        ("method.samplers='2'", "`method.samplers` is '2', which is not a valid value. ("),
        ("method.samplers=true", "`method.samplers` is True, which is not a valid value. ("),
        ("method.samplers=-1", "`method.samplers` is -1, but should be greater than or equal to 0. ("),
        ("train.gradient_checkpointing=0", "is 0, but should be greater than or equal to 1. (Recompute activations"),
        ("method.samplers=[0, 2]", "`method.samplers.0` is 0, but should be greater than or equal to 1. ("),
        ("method.samplers=[1, 2.5]", "`method.samplers.1` is 2.5, but should be a valid integer. ("),
        ("cluster.num_workers=x", "`cluster.num_workers` is 'x', which is not a valid value. (Training processes."),
        ("data.oversample={a: x}", "`data.oversample.a` is 'x', but should be a valid number."),
        ("data.oversample=autoo", "`data.oversample` is 'autoo', which is not a valid value. (How often rows"),
        ("train.gradient_checkpointing=maybe", "`train.gradient_checkpointing` is 'maybe', which is not a valid"),
        ("tune.metric=3", "`tune.metric` is 3, which is not a valid value. (Metric that ranks trials"),
        ("pairs.temperature=[1, hot]", "`pairs.temperature.1` is 'hot', but should be a valid number."),
    ],
)
def test_a_setting_of_several_types_has_one_error(override: str, message: str, job_file) -> None:
    """pydantic reports an error for each type, with names such as `constrained-int` behind the setting's."""
    with pytest.raises(ConfigError) as error:
        load_job(job_file(method={"name": "grpo"}), [override])
    (problem,) = error.value.problems
    assert message in problem
