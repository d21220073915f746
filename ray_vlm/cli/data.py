"""`ray-vlm data`: check, measure and preview a job's rows before training, and write them in another format."""

import argparse
from pathlib import Path

from ray_vlm.cli.parser import job_verb


def add_data_verbs(verbs: argparse._SubParsersAction) -> None:
    """Add `ray-vlm data check|stats|preview|index|convert`."""
    data = verbs.add_parser("data", help="check a job's rows, measure them, and preview them as the model sees them")
    actions = data.add_subparsers(metavar="ACTION", required=True)
    check = job_verb(actions, "check", "read every row of every source; exit code 1 if any is bad", _data_check)
    check.add_argument("--decode", action="store_true", help="also decode every image completely, which takes longer")
    check.add_argument("--bad-rows", metavar="PATH", help="write all bad rows there, as JSON lines")
    stats = job_verb(actions, "stats", "classes, boxes, images, tokens, and the effect of other limits", _data_stats)
    preview = job_verb(actions, "preview", "images and tokens of some rows as the model sees them", _data_preview)
    preview.add_argument("--rows", type=_row_count, default=12, metavar="N", help="how many, 1 to 200 (default: 12)")
    for action, name in ((stats, "stats"), (preview, "preview")):
        action.add_argument(
            "--output", metavar="PATH", help=f"the PNG (default: JOB-{name}.png in <run.output_dir>/data)"
        )

    index = job_verb(actions, "index", "build the index of a job's rows ahead of its runs", _data_index)
    index.add_argument(
        "--prune", action="store_true", help="then delete what belongs to changed or deleted sources or other versions"
    )
    _add_convert(actions)


def _add_convert(actions: argparse._SubParsersAction) -> None:
    convert = job_verb(actions, "convert", "write a job's rows and images in another format", _data_convert)
    convert.add_argument(
        "--to",
        nargs=2,
        required=True,
        metavar=("FORMAT", "OUT"),
        help="the format, one of data.train.format, and a folder that is new or empty",
    )
    parts, modes = ("train", "eval", "test"), ("copy", "link", "inside")
    convert.add_argument("--part", choices=parts, default="train", help="which rows (default: train)")
    convert.add_argument(
        "--images",
        choices=modes,
        default="copy",
        help="copy image files (default), make hard links to them, or write them into the Parquet file of hf_objects",
    )
    convert.add_argument(
        "--allow-loss", action="store_true", help="also write what the format does not hold completely"
    )


def _row_count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 200:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to 200")
    return int(text)


def _data_check(args: argparse.Namespace) -> int:
    from ray_vlm.cluster.preflight import build_demand
    from ray_vlm.config.load import load_job
    from ray_vlm.config.paths import absolute_paths
    from ray_vlm.data.inspect.check import check_sources, describe_check, describe_shares, write_bad_rows
    from ray_vlm.data.parts import build_indexer
    from ray_vlm.data.sources.detect import settle_formats
    from ray_vlm.data.spec import sample_spec

    job, checks = settle_formats(absolute_paths(load_job(args.job, args.overrides)), raise_faults=False), []
    indexer = build_indexer(job.data, job.run.output_dir, job.task.name, build_demand(job))
    for check in check_sources(job.data, sample_spec(job), indexer, args.decode):
        print(describe_check(check), flush=True)
        checks.append(check)
    for line in describe_shares(job.data):
        print(line)
    if args.bad_rows:
        print(f"{write_bad_rows(args.bad_rows, checks)} bad rows written to {args.bad_rows}")
    return 0 if all(check.good for check in checks) else 1


def _data_stats(args: argparse.Namespace) -> None:
    from ray_vlm.config.load import load_job
    from ray_vlm.config.paths import absolute_paths
    from ray_vlm.data.inspect.stats import describe_stats, draw_stats, measure_rows

    job = absolute_paths(load_job(args.job, args.overrides))
    stats = measure_rows(job)
    print(describe_stats(stats))
    picture = draw_stats(stats, f"{Path(args.job).name}: {stats.parts['train'][0]:,} training rows")
    _write_picture(picture, args, "stats", job.run.output_dir)


def _data_preview(args: argparse.Namespace) -> None:
    from ray_vlm.config.load import load_job
    from ray_vlm.config.paths import absolute_paths
    from ray_vlm.data.inspect.preview import build_panels, choose_rows, describe_choice, describe_rows, draw_sheet
    from ray_vlm.data.samples import load_sample_builder
    from ray_vlm.data.sources.detect import settle_formats
    from ray_vlm.train.prepare import prepare

    prepared = prepare(settle_formats(absolute_paths(load_job(args.job, args.overrides))))
    train, builder = prepared.train, load_sample_builder(prepared.spec)
    chosen = choose_rows(*train.kinds, args.rows)
    print(describe_rows(train, builder, chosen))
    title = f"{Path(args.job).name}: {len(chosen.positions)} of {len(train):,} training rows, as the model sees them"
    panels = build_panels((train.records[i] for i in chosen.positions), builder)
    picture = draw_sheet(panels, title, describe_choice(chosen, builder.codec_name))
    _write_picture(picture, args, "preview", prepared.job.run.output_dir)


def _data_index(args: argparse.Namespace) -> None:
    from ray_vlm.config.load import load_job
    from ray_vlm.config.paths import absolute_paths
    from ray_vlm.data.build import prune
    from ray_vlm.data.parts import load_parts

    job = absolute_paths(load_job(args.job, args.overrides))
    named = [name for name in ("train", "eval", "test") if getattr(job.data, name) is not None]
    quarantined = job.model_copy(update={"data": job.data.model_copy(update={"on_bad_row": "quarantine"})})
    parts = load_parts(quarantined, named)
    for name in named:
        index = getattr(parts, name)
        left_out = f"; left out as bad: {len(index.bad):,}" if index.bad else ""
        print(f"data.{name}: {len(index):,} rows, {int(index.tokens.sum()):,} tokens{left_out}")
    folder = index.records.folder
    files = folder.store.files()
    print(f"index: {folder.address} ({len(files):,} files, {sum(files.values()) / 1e6:,.1f} MB)")
    if args.prune:
        count, size = prune(folder)
        print(f"pruned: {count:,} files, {size / 1e6:,.1f} MB")


def _data_convert(args: argparse.Namespace) -> None:
    from ray_vlm.config.load import load_job
    from ray_vlm.config.paths import absolute_paths
    from ray_vlm.data.sources.convert import check_format, convert
    from ray_vlm.data.sources.detect import settle_formats

    format, folder = args.to
    check_format(format)
    job = settle_formats(absolute_paths(load_job(args.job, args.overrides)))
    print(convert(job, format, folder, args.part, args.images, args.allow_loss).describe())


def _write_picture(png: bytes, args: argparse.Namespace, kind: str, output_dir: str) -> None:
    """Write a PNG to `--output`, or by default to `data/` in `output_dir`, and print its address."""
    from ray_vlm.errors import RunError
    from ray_vlm.storage import Store, full_address, join, split_address

    default = f"data/{Path(args.job).stem}-{kind}.png"  # so that pictures of two jobs do not overwrite each other
    address = full_address(args.output) if args.output else join(output_dir, default)
    folder, file = split_address(address)
    try:
        Store(folder).write(file, png)
    except OSError as error:
        raise RunError(f"{address} cannot be written ({error}). Give another --output.") from None
    print(f"\npicture: {address}")
