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
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
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
for _auto, _names, _model in (
    (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, TwofoldForCausalLM),
    (AutoModelForTokenClassification, MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES, TwofoldForTokenClassification),
    (AutoModelForImageClassification, MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES, TwofoldForImageClassification),
):
    _auto.register(TwofoldConfig, _model, exist_ok=True)
    # By these names Transformers tells what a model is for: its Trainer would smooth labels that it has not shifted, without a word.
    _names.setdefault(TwofoldConfig.model_type, _model.__name__)
