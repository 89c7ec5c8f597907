"""Transformers models whose every layer attends through a tie: a language model, a classifier of tokens and sets, a vision transformer.

Importing this package registers them, so that ``AutoModelForCausalLM.from_pretrained`` finds a checkpoint of ours by its configuration, and makes
``attn_implementation="twofold"`` known, by which Transformers' own models attend through our kernels.
"""

from __future__ import annotations

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForTokenClassification,
)

from twofold.models import attention_interface
from twofold.models.causal_lm import TwofoldForCausalLM
from twofold.models.checkpoint import MODELS, load_model
from twofold.models.classification import TwofoldForTokenClassification
from twofold.models.configuration import TwofoldConfig
from twofold.models.pretrained import TwofoldPreTrainedModel
from twofold.models.vision import TwofoldForImageClassification
from twofold.spec import ModelSpec

__all__ = [
    "TwofoldConfig",
    "TwofoldForCausalLM",
    "TwofoldForImageClassification",
    "TwofoldForTokenClassification",
    "TwofoldPreTrainedModel",
    "build_model",
    "load_model",
]


def build_model(spec: ModelSpec, *, seed: int, backend: str = "auto") -> TwofoldPreTrainedModel:
    """A new model in training mode, whose first weights depend on ``seed`` and each parameter's name alone.

    Models of one seed share every tensor that has one name and one shape in both, whatever their ties are.
    """
    return MODELS[spec.architecture](TwofoldConfig.from_spec(spec), backend=backend, initial_seed=seed).train()


attention_interface.register()
AutoConfig.register(TwofoldConfig.model_type, TwofoldConfig, exist_ok=True)
AutoModelForCausalLM.register(TwofoldConfig, TwofoldForCausalLM, exist_ok=True)
AutoModelForTokenClassification.register(TwofoldConfig, TwofoldForTokenClassification, exist_ok=True)
AutoModelForImageClassification.register(TwofoldConfig, TwofoldForImageClassification, exist_ok=True)
