"""`ray-vlm predict`: answers for images, folders and tables, by a run's weights."""

import argparse


def add_predict_verb(verbs: argparse._SubParsersAction) -> None:
    """`ray-vlm predict RUN INPUT... --output PATH`."""
    predict = verbs.add_parser("predict", help="what a run's model says of images, folders or tables")
    predict.add_argument("run", metavar="RUN", help="a run folder, or a name in outputs/")
    predict.add_argument(
        "inputs", nargs="+", metavar="INPUT", help="images, folders of images, or tables with a column"
    )
    predict.add_argument("--output", required=True, metavar="PATH", help="results, .jsonl or .csv")
    predict.add_argument("--draw", metavar="FOLDER", help="also images there, with what was found on them")
    predict.add_argument(
        "--image-root", metavar="FOLDER", help="folder of the images that tables name (default: the table's own)"
    )
    predict.add_argument("--question", metavar="TEXT", help="asked about every image (chat)")
    predict.add_argument("--weights", choices=["best", "final"], help="default: best, or final where there is no best")
    predict.add_argument("--device", choices=["cpu", "cuda"], help="default: what the run trained on")
    predict.add_argument(
        "--num-replicas",
        type=int,
        metavar="N",
        help="processes that hold the model; 0 is this one (default: the job's)",
    )
    predict.set_defaults(verb=_predict)


def _predict(args: argparse.Namespace) -> None:
    from ray_vlm.errors import ConfigError
    from ray_vlm.evaluate.predict import predict_files
    from ray_vlm.evaluate.predictor import Predictor
    from ray_vlm.verbs.runs import find_run

    predictor = Predictor.from_run(find_run(args.run), args.weights, args.device)
    replicas = args.num_replicas if args.num_replicas is not None else predictor.job.evaluate.num_replicas or 0
    if replicas < 0:
        raise ConfigError(f"--num-replicas {replicas}: a number of processes is needed, 0 or more.")
    count = predict_files(
        predictor, args.inputs, args.output, args.question, args.draw, replicas, image_root=args.image_root
    )
    drawn = f"; images in {args.draw}" if args.draw else ""
    print(f"{count} results in {args.output}{drawn}")
