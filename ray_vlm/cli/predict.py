"""`ray-vlm predict`: answer for images, folders and tables with the weights of a run or of another model."""

import argparse
from pathlib import Path


def add_predict_verb(verbs: argparse._SubParsersAction) -> None:
    """Add `ray-vlm predict RUN INPUT... --output PATH`."""
    predict = verbs.add_parser("predict", help="write a model's answers for images, folders or tables")
    predict.add_argument(
        "run",
        metavar="RUN",
        help="a run or a sweep (a folder, or a name in outputs/), its best/ or final/, an exported adapter, a merged "
        "model or a base, each a folder or a name on the hub; or a job file, for its base",
    )
    predict.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="images, folders of images, or rows with a column of images: a table, a pattern or a folder of shards, or "
        "a tar of WebDataset",
    )
    predict.add_argument("--output", required=True, metavar="PATH", help="results, .jsonl or .csv")
    predict.add_argument("--draw", metavar="FOLDER", help="folder for copies of the images with the answers drawn")
    predict.add_argument(
        "--image-root",
        metavar="FOLDER",
        help="folder, or tar file, of the images that tables name (default: the table's own folder)",
    )
    predict.add_argument("--question", type=str, metavar="TEXT", help="asked about every image (chat); may be empty")
    predict.add_argument(
        "--weights",
        choices=["best", "final", "base"],
        help="of a run; base: the model that it started from (default: best, or final if there is no best)",
    )
    predict.add_argument("--base", metavar="NAME", help="an adapter's base, if it is not where it was during training")
    predict.add_argument(
        "--job", metavar="JOB", help="a job file with the task and the prompt, for weights that have none stored"
    )
    predict.add_argument("--device", choices=["cpu", "cuda"], help="default: the device that the run trained on")
    predict.add_argument(
        "--engine", choices=["transformers", "vllm"], help="what answers (default: the job's evaluate.engine)"
    )
    predict.add_argument(
        "--num-replicas",
        type=int,
        metavar="N",
        help="processes that hold the model; 0 is this one (default: the job's)",
    )
    predict.set_defaults(verb=_predict)


def _predict(args: argparse.Namespace) -> None:
    from ray_vlm.cli.runs import find_run
    from ray_vlm.errors import ConfigError
    from ray_vlm.evaluate.predict import predict_files
    from ray_vlm.evaluate.predictor import Predictor
    from ray_vlm.storage import is_remote

    task = "chat" if args.question is not None else None
    name = find_run(args.run)
    if is_remote(name) or (Path(name) / "sweep.json").is_file():
        from ray_vlm.tune.sweep import find_best

        name = find_best(name)
    predictor = Predictor.from_run(name, args.weights, args.device, args.base, args.job, task, args.engine)
    replicas = args.num_replicas if args.num_replicas is not None else predictor.job.evaluate.num_replicas or 0
    if replicas < 0:
        raise ConfigError(f"--num-replicas {replicas}: a number of processes is needed, 0 or more.")
    count = predict_files(
        predictor, args.inputs, args.output, args.question, args.draw, replicas, image_root=args.image_root
    )
    drawn = f"; images in {args.draw}" if args.draw else ""
    print(f"{count} results in {args.output}{drawn}")
