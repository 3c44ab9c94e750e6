"""Made-up packages, changelogs and networks, small enough for a moment's training."""

import hashlib
import random
from typing import Any

import torch
from transformers import GraniteMoeConfig

from granite_ray.quickstart.changelogs import ChangelogEntry, parse_changelog
from granite_ray.quickstart.packages import Package
from granite_ray.quickstart.training.data import Data, split_data
from granite_ray.quickstart.training.network import Network

SEED = 3
SECTIONS = ("admin", "games", "net", "perl")
WORDS = ("a", "tool", "that", "reads", "files", "and", "writes", "pictures", "over", "the", "net")
TINY: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 48,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 2_048,
    "tie_word_embeddings": True,
    "embedding_multiplier": 6.0,
    "residual_multiplier": 0.3,
    "attention_multiplier": 0.3,
    "logits_scaling": 2.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
    "dtype": "bfloat16",
    "architectures": ["GraniteMoeForCausalLM"],
}


def make_network(**values: Any) -> Network:
    """A tiny network in float32, its norms not 1, its weights such as bfloat16 holds too."""
    config = GraniteMoeConfig(**TINY | values)
    network = Network(config, seed=5, dtype=torch.float32, is_compiled=False)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if name.endswith("norm"):
                weight += 0.2 * torch.randn(weight.shape, generator=generator)
            weight.copy_(weight.bfloat16())
    return network


def is_drawn_for_testing(name: str) -> bool:
    return hashlib.sha256(name.encode()).hexdigest().startswith(("0", "1"))


def make_packages() -> list[Package]:
    """Packages whose texts and synopses tell their names; every fourth one shares a paragraph."""
    lot = random.Random(1)
    packages = []
    for number in range(200):
        name = f"pack{number}age"
        own = " ".join(lot.choices(WORDS, k=lot.choice((8, 30, 200))))
        opening = "Common opening.\n\n" if number % 4 == 0 else ""
        text = f"{opening}{name} is {own}."
        packages.append(Package(name, lot.choice(SECTIONS), f"{name} in short", text))
    return packages


def make_entries() -> list[ChangelogEntry]:
    """Entries whose changes tell their source; maintainers are many."""
    entries: list[ChangelogEntry] = []
    for number in range(60):
        source = f"sour{number}ce"
        changelog = "\n".join(
            f"{source} (1.{release}-1) unstable; urgency=medium\n\n"
            f"  * Release {release} of {source}. (Closes: #{100_000 + number}, #7{number:04})\n"
            f"  * Fixes CVE-2020-{1_000 + number}.\n"
            f"  * {' '.join(WORDS * (60 if number % 3 == 0 else 1))}\n\n"
            f" -- Per Son{number} <per@son.org>  Tue, 0{release} Mar 2021 10:11:12 +0100\n"
            for release in (3, 2, 1)
        )
        parsed, num_malformed = parse_changelog(source, changelog)
        assert (len(parsed), num_malformed) == (3, 0)
        entries += parsed
    return entries


def make_data() -> Data:
    return split_data(make_packages(), make_entries())
