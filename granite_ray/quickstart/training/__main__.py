"""Train the embedded checkpoint: `python -m granite_ray.quickstart.training --lists … --work …`.

One command, about two hours on two cores. Stopped and started again it goes on where it was.
"""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from granite_ray.errors import ConfigError
from granite_ray.quickstart.make_tokenizer import CHECKPOINT_PATH
from granite_ray.quickstart.training.bag import learn_bag, set_bag_heads, share_right
from granite_ray.quickstart.training.card import write_card
from granite_ray.quickstart.training.checkpoint import architecture, write_checkpoint
from granite_ray.quickstart.training.data import read_data
from granite_ray.quickstart.training.exam import make_exam
from granite_ray.quickstart.training.induction import set_copying_heads
from granite_ray.quickstart.training.lessons import Lessons, bag_lessons
from granite_ray.quickstart.training.network import Network
from granite_ray.quickstart.training.run import STATE_FILE, Training
from granite_ray.quickstart.training.summary import summarize_training, write_summary
from granite_ray.tokenizer import load_tokenizer

SEED = 1
NUM_STEPS = 4_400

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, or go on training, and write the checkpoint and its model card."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        train(arguments)
    except (ConfigError, FileNotFoundError) as error:
        parser.error(str(error))


def train(arguments: argparse.Namespace) -> None:
    """Read the data, take the steps, and write what came out."""
    data = read_data(arguments.lists, arguments.changelogs)
    tokenizer = load_tokenizer(str(arguments.tokenizer))
    network = Network(architecture(tokenizer), arguments.seed)
    network.to(arguments.device)
    lessons = Lessons(data, tokenizer, arguments.seed)
    if not (arguments.work / STATE_FILE).exists():
        bag = learn_bag(network, bag_lessons(data.packages, tokenizer), arguments.seed)
        right = share_right(bag, bag_lessons(data.held_out_packages, tokenizer))
        logger.info("bag of words learnt: %.3f of held-out sections right", right)
        set_bag_heads(network, bag)
        set_copying_heads(network, arguments.seed)
    training = Training(network, lessons, arguments.work, arguments.steps, arguments.seed)
    training.run(make_exam(data, tokenizer))
    write_summary(summarize_training(training, network, data), arguments.work)
    write_checkpoint(network, tokenizer, arguments.out)
    write_card(arguments.work, arguments.out, evaluations=[])
    logger.info("→ %s", arguments.out)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=__package__, description=__doc__)
    parser.add_argument("--lists", type=Path, required=True, help="folder of apt's lists")
    parser.add_argument("--changelogs", type=Path, required=True, help="folder of changelogs")
    parser.add_argument("--work", type=Path, required=True, help="folder for what is unfinished")
    parser.add_argument("--out", type=Path, default=CHECKPOINT_PATH)
    parser.add_argument("--tokenizer", type=Path, default=CHECKPOINT_PATH)
    parser.add_argument("--steps", type=int, default=NUM_STEPS)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


if __name__ == "__main__":
    main()
