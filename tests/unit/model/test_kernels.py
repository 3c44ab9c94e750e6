"""The CPU kernels against sums in double precision, and a model with them against one without."""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import GraniteMoeConfig, GraniteMoeHybridConfig

from granite_ray.model.architecture import Architecture, read_architecture
from granite_ray.model.granite import GraniteModel
from granite_ray.model.kernels import MAX_TOKENS, CpuKernels, PagedKeys, kernels_for, load_kernels
from granite_ray.model.kernels import compiled as library
from granite_ray.model.layers import rotate, rotation_tables
from granite_ray.model.weights import dummy_model
from granite_ray.model.workspace import Workspace
from tests.forward_batches import Stepper, Turn

ROUNDING = 2**-8
"""Of bfloat16, relative: one rounding of a result."""


@pytest.fixture(scope="module")
def compiled() -> CpuKernels:
    found = load_kernels()
    if found is None:
        pytest.skip("needs a CPU with AVX512-BF16 and a C compiler")
    return found


def draw(*shape: int, std: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape) * std).bfloat16()


def assert_rounded(found: torch.Tensor, exact: torch.Tensor, num_roundings: int = 1) -> None:
    """Each number is the exact one up to so many roundings of numbers of the exact ones' size."""
    tolerance = num_roundings * ROUNDING * exact.abs().clamp(min=float(exact.abs().mean()))
    assert (found.double() - exact).abs().sub(tolerance).max() <= 0


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 4, 5, 7, 8, MAX_TOKENS])
@pytest.mark.parametrize(
    ("size", "out_size"), [(384, 6144), (1024, 67), (32, 4), (64, 5), (2048, 1023)]
)
def test_products_are_exact_but_for_the_last_rounding(
    compiled: CpuKernels, num_tokens: int, size: int, out_size: int
) -> None:
    torch.manual_seed(num_tokens)
    x, weight = draw(num_tokens, size), draw(out_size, size, std=size**-0.5)
    out = torch.full((num_tokens + 1, out_size), torch.nan).bfloat16()
    compiled.linear(x, weight, out)
    assert_rounded(out[:-1], x.double() @ weight.double().t())
    assert out[-1].isnan().all(), "nothing is written behind the last row"


def test_a_row_does_not_depend_on_its_neighbours(compiled: CpuKernels) -> None:
    torch.manual_seed(0)
    x, weight = draw(MAX_TOKENS, 256), draw(100, 256)
    together, alone = torch.empty(MAX_TOKENS, 100).bfloat16(), torch.empty(1, 100).bfloat16()
    compiled.linear(x, weight, together)
    for row in range(MAX_TOKENS):
        compiled.linear(x[row : row + 1], weight, alone)
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize(("num_experts", "num_chosen"), [(8, 2), (5, 3), (1, 1)])
@pytest.mark.parametrize(("size", "width"), [(96, 64), (384, 256), (1536, 512)])
@pytest.mark.parametrize("num_tokens", [1, 6, MAX_TOKENS])
def test_experts_say_a_weighted_sum_of_gated_mlps(
    compiled: CpuKernels,
    num_tokens: int,
    size: int,
    width: int,
    num_experts: int,
    num_chosen: int,
) -> None:
    torch.manual_seed(1)
    x = draw(num_tokens, size)
    input_weight = draw(num_experts, 2 * width, size, std=size**-0.5)
    output_weight = draw(num_experts, size, width, std=width**-0.5)
    # The number of experts stands for one that is elsewhere.
    ids = torch.stack([torch.randperm(num_experts + 1)[:num_chosen] for _ in range(num_tokens)])
    shares = torch.rand(num_tokens, num_chosen).softmax(dim=-1).bfloat16()
    found = compiled.experts(x, ids, shares, (input_weight, output_weight), Workspace())
    exact = torch.zeros(num_tokens, size, dtype=torch.float64)
    for token in range(num_tokens):
        for expert, share in zip(ids[token].tolist(), shares[token].double(), strict=True):
            if expert < num_experts:
                gate, up = (input_weight[expert].double() @ x[token].double()).chunk(2)
                exact[token] += share * (output_weight[expert].double() @ (F.silu(gate) * up))
    # Rounded are gate and up, silu, their product, each answer and the sum: some of it adds up.
    assert_rounded(found, exact, num_roundings=12)
    assert found.isfinite().all()


@pytest.mark.parametrize(("num_experts", "num_chosen"), [(32, 8), (72, 10), (3, 3)])
def test_tokens_go_to_the_experts_of_the_largest_scores(
    compiled: CpuKernels, num_experts: int, num_chosen: int
) -> None:
    torch.manual_seed(4)
    scores = torch.stack([torch.randperm(num_experts) for _ in range(9)]).bfloat16() / 7
    ids, weights = compiled.route(scores, num_chosen)
    expected, expected_ids = scores.double().topk(num_chosen)
    assert torch.equal(ids, expected_ids)
    assert_rounded(weights, expected.softmax(dim=-1))


@pytest.mark.parametrize("num_tokens", [1, 100])
def test_gated_is_silu_of_the_first_half_times_the_second(
    compiled: CpuKernels, num_tokens: int
) -> None:
    torch.manual_seed(7)
    gate_up, inner = draw(num_tokens, 2 * 48, std=4.0), draw(num_tokens, 48)
    compiled.gate(gate_up, inner)
    gate, up = gate_up.double().chunk(2, dim=-1)
    assert_rounded(inner, F.silu(gate) * up, num_roundings=2)


@pytest.mark.parametrize("num_tokens", [7, 100])
def test_norm_divides_by_the_root_of_the_mean_square(compiled: CpuKernels, num_tokens: int) -> None:
    torch.manual_seed(5)
    x, weight, eps = draw(num_tokens, 384, std=3.0), draw(384), 1e-2
    out = torch.empty_like(x)
    compiled.norm(x, weight, eps, out)
    wide = x.double()
    exact = wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.double()
    assert_rounded(out, exact, num_roundings=2)


@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_heads_turn_as_torch_turns_them(compiled: CpuKernels, head_dim: int) -> None:
    torch.manual_seed(6)
    fused = draw(25, 8, head_dim)
    tables = rotation_tables(torch.tensor([0, 1, 7, 500, 9] * 5), 1e4, head_dim, torch.bfloat16)
    exact = fused.double()
    rotate(exact[:, :6], *(table.double() for table in tables))
    compiled.rotate(fused[:, :6], *tables)
    assert_rounded(fused, exact)


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(16, 8), (12, 4), (6, 3), (40, 8), (5, 1)])
@pytest.mark.parametrize(("head_dim", "block_size"), [(64, 16), (128, 4), (64, 256)])
def test_decodes_attend_to_all_that_is_cached(
    compiled: CpuKernels, num_heads: int, num_kv_heads: int, head_dim: int, block_size: int
) -> None:
    torch.manual_seed(2)
    lengths = [1, block_size, block_size + 1, 3 * block_size - 1]
    num_blocks = 16
    # What no sequence has written may be anything.
    keys = torch.full((num_blocks, block_size, num_kv_heads, head_dim), torch.nan).bfloat16()
    values = keys.clone()
    free = iter(torch.randperm(num_blocks).tolist())
    tables = torch.zeros(len(lengths), 3, dtype=torch.int32)
    for sequence, length in enumerate(lengths):
        for index in range(-(-length // block_size)):
            tables[sequence, index] = block = next(free)
            num = min(block_size, length - index * block_size)
            keys[block, :num] = draw(num, num_kv_heads, head_dim)
            values[block, :num] = draw(num, num_kv_heads, head_dim)
    fused = draw(len(lengths), num_heads + 2 * num_kv_heads, head_dim)
    queries, scale = fused[:, :num_heads], 0.09
    # Few sequences divide their heads among threads.
    for chosen, num_threads in (([0, 1, 2, 3], 1), ([0, 1, 2, 3], 2), ([3], 3), ([2, 0], 16)):
        out = torch.full((len(chosen), num_heads, head_dim), torch.nan).bfloat16()
        seen_lengths = torch.tensor(lengths)[chosen]
        cache = PagedKeys(keys, values, tables[chosen], seen_lengths, max(lengths))
        with threads(num_threads):
            compiled.attend(queries[chosen], cache, scale, Workspace(), out)
        for found, sequence in zip(out, chosen, strict=True):
            seen = [
                cached[tables[sequence].long()].flatten(0, 1)[: lengths[sequence]].double()
                for cached in (keys, values)
            ]
            key, value = (one.repeat_interleave(num_heads // num_kv_heads, dim=1) for one in seen)
            scores = torch.einsum("ha,kha->hk", queries[sequence].double(), key) * scale
            assert_rounded(found, torch.einsum("hk,kha->ha", scores.softmax(-1), value))


def test_a_very_large_score_takes_all_the_weight(compiled: CpuKernels) -> None:
    """Exponentials far below and above what float32 holds."""
    keys = torch.zeros(1, 16, 1, 64).bfloat16()
    keys[0, 3] = 100.0
    keys[0, 4] = -100.0
    values = torch.arange(16.0)[None, :, None, None].expand(1, 16, 1, 64).bfloat16().contiguous()
    tables = torch.zeros(1, 1, dtype=torch.int32)
    cache = PagedKeys(keys, values, tables, torch.tensor([16]), 16)
    out = torch.empty(1, 1, 64).bfloat16()
    compiled.attend(torch.ones(1, 1, 64).bfloat16(), cache, 1.0, Workspace(), out)
    assert (out == 3).all()


# when they are there ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.usefixtures("compiled")
def test_they_take_bfloat16_in_sizes_that_fit() -> None:
    weight = torch.empty(64, 64, dtype=torch.bfloat16)
    assert kernels_for(weight, (64, 32)) is load_kernels()
    assert kernels_for(weight, (64, 32), (65, 4)) is None
    assert kernels_for(weight.float(), (64, 32)) is None
    assert kernels_for(weight.to("meta"), (64, 32)) is None


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's cache in which nothing was compiled yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "granite_ray"


def load_again() -> CpuKernels | None:
    return load_kernels.__wrapped__()


@pytest.mark.usefixtures("compiled")
def test_they_are_compiled_once_for_a_user(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_again() is not None
    [found] = cache.iterdir()
    before = found.stat().st_mtime_ns
    assert load_again() is not None
    assert found.stat().st_mtime_ns == before
    monkeypatch.setenv("GRANITE_RAY_CPU_KERNELS", "off")
    assert load_again() is None


@pytest.mark.usefixtures("compiled")
def test_what_an_image_brings_along_needs_no_compiler(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "package"
    package.mkdir()
    for source in library.SOURCE_FOLDER.glob("*.[ch]"):
        shutil.copy(source, package)
    monkeypatch.setattr(library, "SOURCE_FOLDER", package)
    assert library.compile_kernels(package).parent == package
    monkeypatch.setenv("CC", "no-such-compiler")
    assert load_again() is not None
    assert not list(cache.iterdir())


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(
    ("compiler", "reason"),
    [("no-such-compiler", "there is no C compiler; install one"), ("false", "non-zero exit")],
)
def test_a_compiler_that_is_missing_or_fails_is_told_and_lived_without(
    compiler: str,
    reason: str,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("CC", compiler)
    assert load_again() is None
    assert "no CPU kernels, decoding is slower: " in caplog.text
    assert reason in caplog.text
    assert not list(cache.iterdir()), "nothing half made is left"


def test_other_processors_do_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cpuinfo").write_text("processor : 0\nflags : fpu sse2 avx2\n")
    monkeypatch.setattr(library, "CPU_FLAGS_PATH", tmp_path / "cpuinfo")
    caplog.set_level(logging.INFO)
    assert load_again() is None
    assert "they need avx512f" in caplog.text
    monkeypatch.setattr(library, "CPU_FLAGS_PATH", tmp_path / "none")
    assert load_again() is None


# whole models ────────────────────────────────────────────────────────────────────────────────────

SHAPE = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "tie_word_embeddings": True,
    "embedding_multiplier": 6.0,
    "residual_multiplier": 0.3,
    "attention_multiplier": 0.125,
    "logits_scaling": 2.0,
    "num_local_experts": 8,
    "num_experts_per_tok": 3,
}
HYBRID = {
    "layer_types": ["mamba", "attention", "mamba", "mamba"],
    "shared_intermediate_size": 64,
    "position_embedding_type": None,
    "mamba_expand": 8,
    "mamba_n_heads": 16,
    "mamba_d_head": 64,
    "mamba_d_state": 64,  # enough for a step to be shared among threads
    "mamba_n_groups": 2,
}
MODELS = {
    "granitemoe": GraniteMoeConfig(**SHAPE),
    "hybrid": GraniteMoeHybridConfig(**SHAPE | HYBRID),
}
STEPS, LENGTHS, MARGIN = 12, (5, 40, 17), 1.3


def decode(architecture: Architecture, dtype: torch.dtype, like: GraniteModel | None) -> Any:
    """A model's weights, and its logits in some steps of decoding fixed tokens."""
    model = dummy_model(architecture, dtype, torch.device("cpu"), seed=3)
    if like is not None:
        model.load_state_dict({name: one.to(dtype) for name, one in like.state_dict().items()})
    numbers = torch.Generator().manual_seed(0)
    stepper = Stepper(model)
    stepper.run(
        *(
            Turn(seq_id, torch.randint(512, (length,), generator=numbers).tolist())
            for seq_id, length in enumerate(LENGTHS)
        )
    )
    found = []
    for _ in range(STEPS):
        tokens = torch.randint(512, (len(LENGTHS),), generator=numbers).tolist()
        found += stepper.run(*(Turn(seq_id, [token]) for seq_id, token in enumerate(tokens)))
    return model, torch.cat(found).float()


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("name", MODELS)
def test_decoding_with_them_is_as_exact_as_without(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    architecture = read_architecture(MODELS[name].to_dict())
    model, found = decode(architecture, torch.bfloat16, None)
    _, exact = decode(architecture, torch.float32, model)
    load_kernels.cache_clear()
    monkeypatch.setenv("GRANITE_RAY_CPU_KERNELS", "off")
    _, plain = decode(architecture, torch.bfloat16, model)
    monkeypatch.undo()
    load_kernels.cache_clear()
    distance, allowed = (
        ((one - exact).norm(dim=-1) / exact.norm(dim=-1)).median() for one in (found, plain)
    )
    assert not torch.equal(found, plain), "the kernels were not used"
    assert allowed < 0.1, "too far from anything to prove a thing"
    assert distance < MARGIN * allowed
