"""Pack the wheels for a machine with a card that cannot install from an index: `python -m benchmarks.gpu.carry`.

The wheels have the versions in `constraints.txt` and are for another Python. Their own requirements are left out,
because images for training have them: torch, transformers, accelerate, numpy, pandas, pyarrow, pyyaml, psutil, scipy,
jinja2, pillow. The wheel of bitsandbytes holds kernels for every version of CUDA; it is packed with those for one
version and for the CPU. Ray, DeepSpeed and trackers are not needed: the benchmark trains in its own process.
"""

import argparse
import base64
import hashlib
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

LIMIT_MIB = 60.0
PACKAGES = (
    *("trl", "peft", "datasets", "dill", "multiprocess", "bitsandbytes", "pydantic", "pydantic-core"),
    *("annotated-types", "typing-inspection", "typing-extensions"),
)
_PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_24_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
_LIBRARY = re.compile(r"bitsandbytes/libbitsandbytes_(?P<kind>\w+)\.so")


def main(argv: list[str] | None = None) -> int:
    """Write the wheels, print their size, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.carry", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("build/gpu"), help="folder for the wheels")
    parser.add_argument("--python", default="3.12", help="version of Python there")
    parser.add_argument("--cuda", default="130", help="CUDA version of torch there, as 130 for 13.0")
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    for old in args.output.glob("*.whl"):
        old.unlink()
    download(read_versions(Path("constraints.txt")), args.python, args.output)
    for wheel in args.output.glob("bitsandbytes-*.whl"):
        strip_wheel(wheel, args.cuda)
    sizes = {wheel.name: wheel.stat().st_size / 2**20 for wheel in sorted(args.output.glob("*.whl"))}
    for name, mib in sizes.items():
        print(f"{mib:6.1f} MiB  {name}")
    whole = sum(sizes.values())
    print(f"{whole:6.1f} MiB  in all, of at most {LIMIT_MIB:g}")
    print(f"there: python3 -m pip install --no-index --no-deps --target SITE {args.output}/*.whl; PYTHONPATH=SITE ...")
    return 0 if whole <= LIMIT_MIB else 1


def read_versions(path: Path) -> list[str]:
    """Return `name==version` of each package to pack. Raise `ValueError` for one that the file does not pin."""
    pinned = dict(line.split("==") for line in path.read_text().split() if "==" in line)
    known = {name.lower().replace("_", "-"): version for name, version in pinned.items()}
    if absent := [name for name in PACKAGES if name not in known]:
        raise ValueError(f"{path}: {absent[0]} is not pinned. Add a line {absent[0]}==VERSION.")
    return [f"{name}=={known[name]}" for name in PACKAGES]


def download(wanted: list[str], python: str, output: Path) -> None:
    """Fetch wheels for a Python on Linux on x86-64."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "-d",
        str(output),
    ]
    command += ["--implementation", "cp", "--python-version", python]
    for platform in _PLATFORMS:
        command += ["--platform", platform]
    subprocess.run([*command, *wanted], check=True)


def strip_wheel(wheel: Path, cuda: str) -> None:
    """Remove the kernels for other devices from bitsandbytes' wheel. Raise `ValueError` if it has none for this version
    of CUDA."""
    keep = {"cpu", f"cuda{cuda}"}
    with zipfile.ZipFile(wheel) as source:
        kinds = {match["kind"] for name in source.namelist() if (match := _LIBRARY.fullmatch(name))}
        if missing := keep - kinds:
            there = ", ".join(sorted(kind for kind in kinds if kind.startswith("cuda")))
            raise ValueError(f"{wheel.name} has no kernels for {missing.pop()}. It has {there}: name one as --cuda.")
        with tempfile.NamedTemporaryFile(dir=wheel.parent, suffix=".half", delete=False) as half:
            _copy(source, Path(half.name), keep)
    Path(half.name).replace(wheel)


def _copy(source: zipfile.ZipFile, path: Path, keep: set[str]) -> None:
    (listing,) = (name for name in source.namelist() if name.endswith(".dist-info/RECORD"))
    records = []
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            match = _LIBRARY.fullmatch(name)
            if name == listing or (match and match["kind"] not in keep):
                continue
            content = source.read(name)
            target.writestr(source.getinfo(name), content)
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            records.append(f"{name},sha256={digest},{len(content)}")
        target.writestr(listing, "\n".join([*records, f"{listing},,"]) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
