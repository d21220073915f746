"""`ray-vlm init` puts starter jobs into a folder; `ray-vlm completion` prints what a shell needs to complete words."""

import argparse
import shlex
from collections.abc import Callable
from pathlib import Path

# What takes a new folder to a trained run and a prediction; docs/quickstart.md has them too.
_FIRST_STEPS = (
    "ray-vlm train jobs/demo_sft.yaml",
    "ray-vlm runs show demo_sft",
    "ray-vlm evaluate jobs/demo_sft.yaml --adapter outputs/demo_sft/best",
    "ray-vlm predict demo_sft outputs/demo/data/site/test --output found.csv --draw drawn",
)


def add_starter_verbs(verbs: argparse._SubParsersAction, parser: Callable[[], argparse.ArgumentParser]) -> None:
    """`ray-vlm init [FOLDER]` and `ray-vlm completion SHELL`; `parser` makes the whole parser anew."""
    init = verbs.add_parser("init", help="put the starter jobs and spaces into a folder")
    init.add_argument("folder", nargs="?", default=".", help="default: this one")
    init.set_defaults(verb=_init)
    completion = verbs.add_parser("completion", help='word completion: eval "$(ray-vlm completion bash)"')
    completion.add_argument("shell", choices=["bash", "zsh", "tcsh"])
    completion.set_defaults(verb=lambda args: _completion(args.shell, parser()))


def _init(args: argparse.Namespace) -> None:
    from ray_vlm.demo.story import find_job
    from ray_vlm.errors import RunError

    source = find_job("demo_sft.yaml").parent
    files = {
        Path(folder.name) / path.name: path
        for folder in (source, source.parent / "tune_spaces")
        for path in sorted(folder.iterdir())
        if path.suffix in (".yaml", ".md")
    }
    target = Path(args.folder)
    if there := [str(target / name) for name in files if (target / name).exists()]:
        raise RunError(f"{', '.join(there)}: already there, and nothing was written. Give another folder.")
    try:
        for name, path in files.items():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes(path.read_bytes())
    except OSError as error:
        raise RunError(f"{target} cannot be written ({error}). Give another folder.") from None
    print("\n".join(f"wrote {target / name}" for name in files))
    print("\nnext, about 3 minutes on 2 CPU cores:")
    steps = [] if args.folder == "." else [f"cd {shlex.quote(args.folder)}"]
    print("\n".join(f"    {step}" for step in (*steps, *_FIRST_STEPS)))


def _completion(shell: str, parser: argparse.ArgumentParser) -> None:
    import shtab

    print(shtab.complete(parser, shell))
