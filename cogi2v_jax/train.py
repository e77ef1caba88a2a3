"""`python -m cogi2v_jax.train`: a recipe -> a LoRA, a model or a VAE."""

import argparse
import signal
import sys

from . import __version__
from .command import Parser, run, say
from .devices import hosts
from .terminal import printing
from .training.recipe import RECIPES, read_recipe


def parser() -> argparse.ArgumentParser:
    names = ", ".join(sorted(path.stem for path in RECIPES.glob("*.toml")))
    main = Parser(
        allow_abbrev=False,
        prog="python -m cogi2v_jax.train",
        description="Trains a LoRA, a whole transformer or a VAE on clips that "
        "`python -m cogi2v_jax.prepare` has prepared. The same command again goes on from the last "
        "checkpoint.",
        epilog=f"Recipes that come with the package: {names}. docs/training.md explains every key.",
    )
    main.add_argument("--version", action="version", version=f"cogi2v-jax {__version__}")
    main.add_argument("recipe", metavar="RECIPE.toml", help="a recipe's file, or its name")
    main.add_argument(
        "changes", metavar="key=value", nargs="*", help="keys in place of the recipe's own"
    )
    return main


@hosts.distributed
@printing
def main(arguments: list[str] | None = None) -> int:
    """Exit codes: 0 done or stopped by SIGTERM after a checkpoint, 1 could not be done, 2 wrong
    arguments, 130 stopped by the user."""
    options = parser().parse_args(arguments)
    return run(lambda: _train(options), "stopped; the last checkpoint is kept")


def _train(options: argparse.Namespace) -> int:
    recipe = read_recipe(options.recipe, options.changes)
    hosts.join(preemption=True)
    from .training.loop import Stopped, train

    try:
        train(recipe, say)
    except Stopped as stopped:
        say(f"cogi2v: {stopped}")
        return 130 if stopped.signal == signal.SIGINT else 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
