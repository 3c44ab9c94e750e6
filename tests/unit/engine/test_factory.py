import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from granite_ray.config import EngineConfig, ModelConfig
from granite_ray.engine.devices import choose_device
from granite_ray.engine.reference.loading import load_model
from granite_ray.errors import ConfigError

CPU = EngineConfig(device="cpu")


def test_fake_engine_needs_no_torch(moe):
    code = f"""
import asyncio, sys
from granite_ray.checkpoint import open_checkpoint
from granite_ray.config import EngineConfig, ModelConfig
from granite_ray.engine.factory import make_engine
from granite_ray.records import Grammar, Prompt, SamplingParams
model = ModelConfig(path={moe.path!r})
engine = make_engine(open_checkpoint(model), model, EngineConfig(backend="fake"))
grammar = Grammar('{{"type": "object", "properties": {{"a": {{"type": "integer"}}}}}}')
asyncio.run(engine.generate(Prompt((30, 31)), SamplingParams(20), grammar))
print("torch" in sys.modules, "transformers" in sys.modules)
"""
    command = [sys.executable, "-c", code]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert told.split() == ["False", "False"]


def test_dummy_weights_need_no_files_and_are_the_same_each_time(checkpoint, tmp_path):
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(f"{checkpoint.path}/{name}", tmp_path / name)
    dummy = ModelConfig(path=str(tmp_path), load_format="dummy")
    torch.manual_seed(1)
    first = load_model(str(tmp_path), dummy, CPU).state_dict()
    torch.manual_seed(2)
    second = load_model(str(tmp_path), dummy, CPU).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    real = load_model(checkpoint.path, ModelConfig(), CPU).state_dict()
    assert {name: values.shape for name, values in first.items()} == {
        name: values.shape for name, values in real.items()
    }


def test_dummy_models_write_text_that_varies(checkpoint):
    model = load_model(checkpoint.path, ModelConfig(load_format="dummy"), CPU)
    ids = torch.tensor([[30, 40, 50, 60]])
    with torch.inference_mode():
        out = model.generate(ids, max_new_tokens=30, do_sample=False)[0, 4:]
    assert len(set(out.tolist())) > 12


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_dtype_is_the_checkpoints_own_unless_told(moe, load_format):
    def dtype_of(name):
        model = ModelConfig(dtype=name, load_format=load_format)
        return load_model(moe.path, model, CPU).dtype

    assert dtype_of("auto") == torch.float32
    assert dtype_of("bfloat16") == torch.bfloat16


def test_a_checkpoint_that_lacks_a_tensor_is_refused(moe, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(moe.path, folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"layers\.1\.self_attn\.q_proj"):
        load_model(str(folder), ModelConfig(), CPU)


def test_a_checkpoint_without_safetensors_is_refused(moe, tmp_path):
    folder = tmp_path / "pickled"
    shutil.copytree(moe.path, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"model\.path"):
        load_model(str(folder), ModelConfig(), CPU)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_missing_gpu_is_named():
    assert choose_device("auto") == torch.device("cpu")
    with pytest.raises(ConfigError, match=r"engine\.device is cuda"):
        choose_device("cuda")
