"""How well held-out texts are known, each token predicted after the right ones before it.

That is easier than writing an answer, and says sooner whether a training goes well; how good
answers are, `granite-ray eval` measures on jobs.
"""

from collections.abc import Mapping

import torch

from granite_ray.quickstart.training.batches import make_batch
from granite_ray.quickstart.training.data import Data
from granite_ray.quickstart.training.groups import Epochs, Group, Row, ask_about
from granite_ray.quickstart.training.lessons import (
    ANSWER_WEIGHT,
    description_sizes,
    entry_sizes,
)
from granite_ray.quickstart.training.network import Network
from granite_ray.quickstart.training.prompts import PromptShapes
from granite_ray.quickstart.training.records import record_of
from granite_ray.quickstart.training.texts import MAX_DESCRIPTION_TOKENS, shorten
from granite_ray.quickstart.training.timetable import Kind
from granite_ray.tasks.wording import compact_json
from granite_ray.tokenizer import Tokenizer

NUM_GROUPS: Mapping[Kind, int] = {"section": 64, "synopsis": 16, "entry": 16}
"""A label is one thing to know of a text, a synopsis or a record are many."""

Exam = dict[Kind, list[Group]]


def make_exam(
    data: Data, tokenizer: Tokenizer, num_groups: Mapping[Kind, int] = NUM_GROUPS
) -> Exam:
    """Return questions about held-out texts, always the same, with nothing to predict but answers.

    A long text is asked about by its first chunk, and the answer is what that says.
    """
    shapes = PromptShapes(tokenizer).exam(data.labels)
    end = tokenizer.eos_token_ids[0]

    def ask(
        kind: Kind, texts: list[list[int]], answers: list[str], sizes: list[int]
    ) -> list[Group]:
        encoded = [
            Row([*token_ids, end], [ANSWER_WEIGHT] * (len(token_ids) + 1))
            for token_ids in tokenizer.encode_texts(answers)
        ]
        return [
            ask_about(
                kind,
                shapes[kind],
                [texts[index] for index in indexes],
                [encoded[index] for index in indexes],
                lambda: 0.0,
            )
            for indexes in Epochs(kind, sizes, seed=0).groups(0)[: num_groups[kind]]
        ]

    packages = data.held_out_packages
    texts = tokenizer.encode_texts([package.text for package in packages])
    texts = [token_ids[:MAX_DESCRIPTION_TOKENS] for token_ids in texts]
    entries = [shorten(entry.text, tokenizer) for entry in data.held_out_entries]
    records = [compact_json(record_of(text)) for text, _ in entries]
    sizes = description_sizes(texts)
    return {
        "section": ask("section", texts, [package.section for package in packages], sizes),
        "synopsis": ask("synopsis", texts, [package.synopsis for package in packages], sizes),
        "entry": ask(
            "entry", [ids for _, ids in entries], records, entry_sizes(data.held_out_entries)
        ),
    }


def examine(network: Network, exam: Exam) -> dict[str, float]:
    """Return the loss a token, in nats, and the share of answers right to the last token."""
    told: dict[str, float] = {}
    for kind, groups in exam.items():
        losses, are_right = [], []
        for group in groups:
            with torch.no_grad():
                loss, hits, _ = network(make_batch([group]).to(network.embedding.device))
            losses.append(loss)
            sizes = [sum(weight > 0 for weight in row.weights) for row in group.rows]
            are_right += [bool(hits_of_row.all()) for hits_of_row in hits.split(sizes)]
        told[f"{kind} loss"] = round(float(torch.cat(losses).mean()), 4)
        told[f"{kind} exact"] = round(sum(are_right) / len(are_right), 4)
    return told
