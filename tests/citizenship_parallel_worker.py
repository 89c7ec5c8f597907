"""What one of several processes does with its part of each model in a folder: told as JSON, and compared by test_citizenship_parallel.py."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.distributed import DistributedConfig

from model_strategies import drawn_tokens
from twofold.errors import TwofoldError
from twofold.models import TwofoldForCausalLM
from twofold.models.quiet import without_bars

TOKENS = drawn_tokens(2, 7)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def facts(model: TwofoldForCausalLM) -> dict[str, Any]:
    """Logits, cache and tokens of a model, and the gradients of its loss, each as if it were whole."""
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    with torch.no_grad():
        output = model(TOKENS, attention_mask=mask, use_cache=True)
        cache = output["cache" if "cache" in output else "past_key_values"]
        options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": mask, "disable_compile": True}
        generated = {
            kind: model.generate(TOKENS, cache_implementation=kind, **options).tolist()
            for kind in ("dynamic", "static")
        }
    model.train()
    loss = model(TOKENS, labels=TOKENS).loss
    loss.backward()
    return {
        "logits": output.logits[mask.bool()].tolist(),
        "cache_bytes": cache.nbytes,
        "generated": generated,
        "loss": loss.item(),
        "gradients": {
            name: whole(parameter.grad).double().tolist()
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        },
    }


def tell(folder: Path) -> None:
    rank, size, found = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), {}
    for path in sorted(folder.iterdir()):
        try:
            model = TwofoldForCausalLM.from_pretrained(
                path, dtype=torch.float64, distributed_config=DistributedConfig(tp_size=size, tp_plan="auto")
            )
        except TwofoldError as error:
            found[path.name] = {"refused": str(error)}
            continue
        found[path.name] = facts(model)
        found[path.name]["parameters_here"] = sum(
            (parameter.to_local() if hasattr(parameter, "to_local") else parameter).numel()
            for parameter in model.parameters()
        )
        model.save_pretrained(folder.parent / "saved" / path.name)  # every process is asked, one writes
    (folder.parent / f"rank{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    with without_bars():
        tell(Path(sys.argv[1]))
