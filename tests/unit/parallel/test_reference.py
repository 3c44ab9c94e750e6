"""Our ranks against transformers' own expert parallelism on as many processes."""

import os
from pathlib import Path

import pytest
import torch

from granite_ray.model.architecture import read_architecture
from granite_ray.model.weights import load_weights
from granite_ray.parallel.experts import GroupDispatcher
from granite_ray.parallel.place import RankPlace
from granite_ray.tokenizer import read_checkpoint_json
from tests.forward_batches import Stepper, Turn
from tests.ranks import CPU, PATIENCE_S, join, run_ranks
from tests.tiny_models import write_checkpoint

pytestmark = [pytest.mark.ranks, pytest.mark.slow, pytest.mark.timeout(1200)]

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3], [27, 18, 28, 18, 28, 45, 90, 45, 23, 53]]


def compute_theirs(place: RankPlace, path: str) -> torch.Tensor:
    """Logits of transformers, whose ranks share one batch: all tokens, on every rank."""
    from datetime import timedelta

    import torch.distributed as dist
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    os.environ |= {
        "RANK": str(place.rank),
        "LOCAL_RANK": str(place.rank),
        "WORLD_SIZE": str(place.size),
    }
    store = dist.TCPStore(*place.meeting, is_master=False, timeout=timedelta(seconds=PATIENCE_S))
    os.environ |= {"MASTER_ADDR": place.meeting[0], "MASTER_PORT": str(place.meeting[1])}
    dist.init_process_group("gloo", store=store, rank=place.rank, world_size=place.size)
    how = DistributedConfig(tp_size=place.size, ep_size=place.size, ep_implementation="all_to_all")
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, distributed_config=how, attn_implementation="eager"
    ).eval()
    experts = [m for name, m in model.named_parameters() if name.endswith("experts.gate_up_proj")]
    assert experts, "it names its experts in another way now"
    assert all(len(getattr(one, "_local_tensor", one)) == 2 for one in experts), "not divided"
    with torch.inference_mode():
        return model(torch.tensor(PROMPTS), use_cache=False).logits.float()


def compute_ours(place: RankPlace, path: str) -> torch.Tensor:
    """Logits of this rank's own prompt, [T, V]."""
    group = join(place)
    architecture = read_architecture(read_checkpoint_json(Path(path), "config.json") or {})
    dispatcher = GroupDispatcher(group, architecture.num_local_experts, CPU)
    model = load_weights(path, architecture, dtype=torch.float32, device=CPU, dispatcher=dispatcher)
    [logits] = Stepper(model).run(Turn(0, PROMPTS[place.rank]))
    return logits


@pytest.mark.parametrize("kind", ["granitemoe", "granitemoehybrid"])
def test_logits_are_those_of_transformers_own_expert_parallelism(tmp_path: Path, kind: str) -> None:
    path = str(write_checkpoint(tmp_path, kind))
    theirs, ours = run_ranks(2, compute_theirs, path), run_ranks(2, compute_ours, path)
    for rank, found in enumerate(ours):
        torch.testing.assert_close(found, theirs[0][rank], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(theirs[1][rank], theirs[0][rank], rtol=1e-4, atol=1e-4)
