"""The steps of a training, and how one goes on that was stopped.

Every 200 steps all is saved in `state.pt`; losses are logged in `log.jsonl`. With the same data and
seed, on the same machine, one that was stopped ends with the same weights as one that was not.
"""

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from granite_ray.errors import ConfigError
from granite_ray.quickstart.training.batches import make_batch
from granite_ray.quickstart.training.exam import Exam, examine
from granite_ray.quickstart.training.groups import GROUP_TOKENS, Group
from granite_ray.quickstart.training.lessons import GUESS_WEIGHT, LABEL_WEIGHT, Lessons
from granite_ray.quickstart.training.network import Network
from granite_ray.quickstart.training.timetable import Kind, deal_groups

STEP_TOKENS = 4_000
COPYING_UNTIL = 0.1
"""Share of the steps that are for copying first of all."""
CONSTANT_UNTIL = 0.4
"""Share of the steps before the learning rates fall, linearly, to nothing."""
NUM_WARMING = 20
"""Steps in which the learning rates rise."""
MUON_RATE = 0.01
EMBEDDING_RATE = 1e-3
ADAM_RATE = 5e-4
BALANCE_WEIGHT = 0.01
"""Of the load-balancing loss of the router."""
STEPS_A_REPORT = 40
STEPS_AN_EXAM = 600
STEPS_A_SAVE = 200
STATE_FILE = "state.pt"
LOG_FILE = "log.jsonl"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Identity:
    """What decides which weights a training ends with; `data` is the digest of its lessons."""

    steps: int
    seed: int
    data: str


class Training:
    """A run of so many steps: Muon for matrices, Adam for the others (arXiv 2502.16982)."""

    def __init__(
        self, network: Network, lessons: Lessons, work_path: Path, num_steps: int, seed: int
    ) -> None:
        """Begin, or take up what was saved in the folder.

        Raises:
            ConfigError: The folder holds another training.
        """
        self._network, self._lessons = network, lessons
        self._work_path = work_path
        self.identity = Identity(num_steps, seed, lessons.digest())
        num_groups = round(STEP_TOKENS / GROUP_TOKENS)
        self._dealt = deal_groups(num_steps, int(COPYING_UNTIL * num_steps), num_groups)
        matrices: list[torch.nn.Parameter] = []
        others: list[torch.nn.Parameter] = []
        for name, weight in network.named_parameters():
            is_matrix = weight.dim() == 2 and not name.endswith("router")
            if name != "embedding":
                (matrices if is_matrix else others).append(weight)
        self._muon = torch.optim.Muon(matrices, lr=MUON_RATE, weight_decay=0.01)
        rated = [
            {"params": [network.embedding], "rate": EMBEDDING_RATE},
            {"params": others, "rate": ADAM_RATE},
        ]
        self._adam = torch.optim.Adam(rated, lr=ADAM_RATE, betas=(0.9, 0.98), fused=True)
        self.step, self.num_tokens, self.seconds = 0, 0, 0.0
        work_path.mkdir(parents=True, exist_ok=True)
        if (work_path / STATE_FILE).exists():
            self._restore()

    def run(self, exam: Exam) -> None:
        """Take the steps that are left; save, report and examine on the way."""
        last = self.identity.steps
        told: dict[Kind, list[float]] = {}
        started, before, first_tokens = time.monotonic(), self.seconds, self.num_tokens
        while self.step < last:
            for kind, loss in self._take_step().items():
                told.setdefault(kind, []).append(loss)
            elapsed = time.monotonic() - started
            self.seconds = before + elapsed
            if self.step % STEPS_A_REPORT == 0:
                losses = {kind: round(sum(all_) / len(all_), 4) for kind, all_ in told.items()}
                speed = round((self.num_tokens - first_tokens) / elapsed)
                self._log({"losses": losses, "tokens_per_s": speed})
                told = {}
            if self.step % STEPS_AN_EXAM == 0 or self.step == last:
                self._log({"held out": examine(self._network, exam)})
            if self.step % STEPS_A_SAVE == 0 or self.step == last:
                self._save()

    def _take_step(self) -> dict[Kind, float]:
        progress = self.step / self.identity.steps
        falling = min(1.0, (1 - progress) / (1 - CONSTANT_UNTIL))
        for parameters in (*self._muon.param_groups, *self._adam.param_groups):
            rate = parameters.get("rate", MUON_RATE)
            parameters["lr"] = rate * falling * min(1.0, (self.step + 1) / NUM_WARMING)
        groups = self._lessons.step(self._dealt[self.step], self.step)
        batch = make_batch(groups).to(self._network.embedding.device)
        losses, _, imbalance = self._network(batch)
        loss = (losses * batch.weights).sum() / batch.weights.sum() + BALANCE_WEIGHT * imbalance
        loss.backward()
        self._muon.step()
        self._adam.step()
        self._muon.zero_grad()
        self._adam.zero_grad()
        self.step += 1
        self.num_tokens += len(batch.token_ids_T)
        return _answer_losses(groups, losses.detach(), batch.weights)

    def _log(self, told: dict[str, Any]) -> None:
        line = {"step": self.step, "tokens": self.num_tokens, "seconds": round(self.seconds)}
        with (self._work_path / LOG_FILE).open("a", encoding="utf-8") as log:
            log.write(f"{json.dumps(line | told)}\n")
        logger.info(
            "step %d, %.2f M tokens: %s", self.step, self.num_tokens / 1e6, json.dumps(told)
        )

    def _save(self) -> None:
        state = {
            "network": self._network.state_dict(),
            "muon": self._muon.state_dict(),
            "adam": self._adam.state_dict(),
            "step": self.step,
            "num_tokens": self.num_tokens,
            "seconds": self.seconds,
            "num_steps": self.identity.steps,
            "seed": self.identity.seed,
            "data": self.identity.data,
        }
        path = self._work_path / STATE_FILE
        unfinished = path.with_suffix(".tmp")
        torch.save(state, unfinished)
        unfinished.replace(path)

    def _restore(self) -> None:
        state = torch.load(self._work_path / STATE_FILE, weights_only=True)
        saved = Identity(state["num_steps"], state["seed"], state["data"])
        _check_same(self.identity, saved, self._work_path)
        self._network.load_state_dict(state["network"])
        self._muon.load_state_dict(state["muon"])
        self._adam.load_state_dict(state["adam"])
        self.step, self.num_tokens = state["step"], state["num_tokens"]
        self.seconds = state["seconds"]
        logger.info("going on after step %d", self.step)


def _check_same(asked: Identity, saved: Identity, work_path: Path) -> None:
    other = "Give the same, or another --work folder."
    for name, now, then in (
        ("--steps", asked.steps, saved.steps),
        ("--seed", asked.seed, saved.seed),
    ):
        if now != then:
            raise ConfigError(
                f"{name} is {now}, but {then} in the training in {work_path}. {other}"
            )
    if asked.data != saved.data:
        raise ConfigError(
            f"--lists, --changelogs or --tokenizer hold other data than the training in "
            f"{work_path} began with, or it was begun by another version. {other}"
        )


def _answer_losses(
    groups: Sequence[Group], losses: torch.Tensor, weights: torch.Tensor
) -> dict[Kind, float]:
    """Return the mean loss of each kind's answers; of sections only the label's."""
    told: dict[Kind, list[float]] = {}
    sizes = [sum(weight > 0 for row in group.rows for weight in row.weights) for group in groups]
    for group, loss, weight in zip(groups, losses.split(sizes), weights.split(sizes), strict=True):
        least = LABEL_WEIGHT if group.kind == "section" else GUESS_WEIGHT
        told.setdefault(group.kind, []).append(float(loss[weight >= least].mean()))
    return {kind: sum(all_) / len(all_) for kind, all_ in told.items()}
