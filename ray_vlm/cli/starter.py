"""`ray-vlm init` writes starter jobs into a folder; `ray-vlm completion` prints a shell's completion script."""

import argparse
import shlex
from collections.abc import Callable
from pathlib import Path

# The commands from a new folder to a trained run and a prediction, as in docs/quickstart.md.
_FIRST_STEPS = (
    "ray-vlm train jobs/demo_sft.yaml",
    "ray-vlm runs show demo_sft",
    "ray-vlm evaluate jobs/demo_sft.yaml --adapter outputs/demo_sft/best",
    "ray-vlm predict demo_sft outputs/demo/data/site/test --output found.csv --draw drawn",
)


def add_starter_verbs(verbs: argparse._SubParsersAction, parser: Callable[[], argparse.ArgumentParser]) -> None:
    """Add `ray-vlm init [FOLDER]` and `ray-vlm completion SHELL`; `parser` builds the parser of `ray-vlm`."""
    init = verbs.add_parser("init", help="write the starter jobs and search spaces into a folder")
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
    if existing := [str(target / name) for name in files if (target / name).exists()]:
        raise RunError(f"{', '.join(existing)}: already there, and nothing was written. Give another folder.")
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
