"""`oscar-radix`: the embedded model, calibration ahead of time, a look into calibration files, and into a running server's radix tree."""

import argparse
import json
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand. Returns the exit code: 0, or 2 with one line on stderr."""
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except KeyboardInterrupt:
        print("oscar-radix: interrupted", file=sys.stderr)
        return 2
    except (OSError, RuntimeError, ValueError) as error:
        print(f"oscar-radix: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="oscar-radix", description="Tools around the 2-bit radix prefix cache.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    model = commands.add_parser("model", help="print the folder of the embedded model, preparing it if needed")
    model.set_defaults(run=_model)

    calibrate = commands.add_parser("calibrate", help="measure a model's keys and values on a text and write a calibration file")
    calibrate.add_argument("--model", type=Path, required=True, metavar="M", help="Hugging Face folder of the model")
    calibrate.add_argument("--text", type=Path, required=True, metavar="F", help="UTF-8 text, as close to your traffic as you have it")
    calibrate.add_argument("-o", "--out", type=Path, required=True, metavar="OUT", help="safetensors file to write")
    calibrate.add_argument("--recipe", metavar="R", help="codec recipe; the default recipe if left out")
    calibrate.add_argument("--max-tokens", type=_positive, default=16384, metavar="N", help="tokens of the text to read (%(default)s)")
    calibrate.set_defaults(run=_calibrate)

    inspect = commands.add_parser("inspect", help="print model, geometry, recipe, widths and error per layer of a calibration file")
    inspect.add_argument("file", type=Path, metavar="FILE")
    inspect.set_defaults(run=_inspect)

    tree = commands.add_parser("tree", help="print the radix tree of a running server: tokens, levels, readers and mass of each node")
    tree.add_argument("--url", default="http://127.0.0.1:30000", metavar="URL", help="of the server (%(default)s)")
    tree.add_argument("--json", action="store_true", help="the nodes as JSON, one list entry a data-parallel rank")
    tree.set_defaults(run=_tree)
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value


def _say(line: str) -> None:
    """Progress goes to stderr, so that stdout holds nothing but the answer."""
    print(line, file=sys.stderr, flush=True)


def _model(args: argparse.Namespace) -> None:
    from oscar_radix.model import prepare

    print(prepare(progress=_say))


def _calibrate(args: argparse.Namespace) -> None:
    from oscar_radix.calibration.collect import calibrate

    if not (args.model / "config.json").is_file():
        raise ValueError(f"--model {args.model} is not a Hugging Face folder: it has no config.json")
    if not args.text.is_file():
        raise ValueError(f"--text {args.text} is not a file")
    if not args.out.parent.is_dir():
        raise ValueError(f"-o {args.out}: the folder {args.out.parent} does not exist")
    calibrate(args.model, args.text.read_text(encoding="utf-8"), args.recipe, args.out, args.max_tokens, _say)
    print(args.out)


def _inspect(args: argparse.Namespace) -> None:
    from oscar_radix.calibration.report import describe

    if not args.file.is_file():
        raise ValueError(f"{args.file} is not a file")
    print(describe(args.file))


def _tree(args: argparse.Namespace) -> None:
    from oscar_radix.tree_report import fetch_trees, render

    trees = fetch_trees(args.url)
    print(json.dumps(trees) if args.json else "\n\n".join(render(tree) for tree in trees))


if __name__ == "__main__":
    sys.exit(main())
