"""`ray-vlm export`: write an adapter or a merged model that loads without this package."""

import argparse


def add_export_verb(verbs: argparse._SubParsersAction) -> None:
    """Add `ray-vlm export RUN|SWEEP [--merged]`."""
    export = verbs.add_parser("export", help="a run's adapter with a model card, or merged into one model")
    export.add_argument(
        "run", metavar="RUN", help="a run, or a sweep for its best trial: a folder, or a name in outputs/"
    )
    export.add_argument("--merged", action="store_true", help="one model, merged into the base without quantisation")
    export.add_argument("--weights", choices=["best", "final"], help="default: best, or final where there is no best")
    export.add_argument(
        "--precision", choices=["bf16", "fp16", "fp32"], help="of a merged model (default: the run's train.precision)"
    )
    export.add_argument("--output", metavar="FOLDER", help="a new folder (default: export/ in the run)")
    export.set_defaults(verb=_export)


def _export(args: argparse.Namespace) -> None:
    from ray_vlm.cli.runs import find_run
    from ray_vlm.evaluate.export import export_run
    from ray_vlm.tune.sweep import find_best

    run = find_best(find_run(args.run))
    export_run(run, args.output, args.merged, args.weights, precision=args.precision)
