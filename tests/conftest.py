"""What several test files share: small models and tokenizers, and one model that sft.py has trained."""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # equal bits and narrow tolerances are claims about the CPU
os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here may depend on the network

import importlib
import json
from pathlib import Path

import pytest
import torch

import dpo
import grpo
import ppo
import rm
import sft
import sync

CORE = {"sft": sft, "rm": rm, "dpo": dpo, "grpo": grpo, "ppo": ppo}
VARIANTS = {
    path.stem: importlib.import_module(f"variants.{path.stem}") for path in sync.scripts() if path.parent != sync.ROOT
}
SCRIPTS = CORE | VARIANTS
PARENT = {name: name for name in CORE}  # of each script; a core script is its own
PARENT |= {name: sync.declared(Path(script.__file__).read_text())[0][:-3] for name, script in VARIANTS.items()}
DATA = Path(__file__).parent / "data"


def known(name, settings):
    """Those of the settings that the script has a field for."""
    return {key: x for key, x in settings.items() if hasattr(SCRIPTS[name].Args, key)}


def save_tiny(folder, seed=0, **config):
    """The tiny model with random weights, changed as `config` says, and its tokenizer, in a folder."""
    tokenizer, model = sft.tiny(seed)
    if config:
        torch.manual_seed(seed)
        model = type(model)(type(model.config)(**(model.config.to_dict() | {"layer_types": None} | config)))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def write_rows(path, rows):
    """Rows as a .jsonl file."""
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with a model of two narrow layers and random weights, and its tokenizer of bytes."""
    return save_tiny(tmp_path_factory.mktemp("tiny"), hidden_size=64, intermediate_size=128, num_hidden_layers=2)


@pytest.fixture(scope="session")
def sft_run(tmp_path_factory):
    """A short run of sft.py on the built-in task, which solves some of it: the folder and the last metrics."""
    out = str(tmp_path_factory.mktemp("runs") / "sft")
    return out, sft.main(sft.Args(out=out, steps=800, eval_size=300, eval_every=0, save_every=0))
