"""Runs made sparse after the fact: what `train.py --sparsity.*` would have left there."""

from pathlib import Path

import torch

import zoo
from zoo.weights import write_safetensors


def make_sparse(run: Path, density: float = 0.25) -> zoo.sparsity.SparseModel:
    """Random masks in both checkpoints of a run, and their report and picture beside these."""
    model = zoo.create_model(f"local-dir:{run / 'best'}")
    torch.manual_seed(0)
    masks = {name: torch.rand(w.shape) < density for name, w in zoo.sparsity.sparse_parameters(model).items()}
    zoo.sparsity.apply_masks(model, masks)
    for name in ("best", "last"):
        write_safetensors(model.state_dict(), run / name / "model.safetensors")
        zoo.sparsity.save_masks(masks, run / name / "masks.safetensors")
    found = zoo.sparsity.report(model, masks=masks)
    (run / "sparsity.json").write_text(found.to_json())
    found.plot(run / "masks.png")
    return found
