"""What the three architectures share as Transformers models: first weights, the backend, and the arguments that ``forward`` may be given."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from twofold.attention import Attention
from twofold.errors import TwofoldError
from twofold.models import card
from twofold.models.attention_interface import NAME, backend_of
from twofold.models.blocks import Record
from twofold.models.configuration import TwofoldConfig
from twofold.models.initialization import initialize
from twofold.models.parallel import check_tensor_parallel

# What Transformers may hand to any forward, and what is asked of these models nowhere else.
COMMON_OPTIONS = ("return_dict", "output_hidden_states", "output_attentions")

_DTYPES = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class TwofoldPreTrainedModel(PreTrainedModel):
    """Weights drawn per parameter name, from ``initial_seed`` or else from one number of torch's own random state.

    ``backend`` is the attention kernel (see :mod:`twofold.kernels`); Transformers' own way to say it, ``attn_implementation`` ("twofold", "sdpa" or
    "eager", in the configuration or ``from_pretrained``), is understood where ``backend`` is left out. Either is a matter of this process, not of
    the checkpoint. Raises TwofoldError for the configuration of another architecture, and for an implementation that these models do not have.
    """

    architecture: ClassVar[str]
    config_class = TwofoldConfig
    config: TwofoldConfig
    base_model_prefix = "trunk"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["Block"]
    _supports_sdpa = True
    _can_compile_fullgraph = True

    def __init__(self, config: TwofoldConfig, *, backend: str = "auto", initial_seed: int | None = None) -> None:
        if config.architecture != self.architecture:
            raise TwofoldError(
                f"{type(self).__name__} is a {self.architecture}, but the configuration says {config.architecture}: "
                f"set architecture={self.architecture!r}."
            )
        super().__init__(config)
        self.backend = backend_of(config._attn_implementation) if backend == "auto" else backend
        if initial_seed is None:
            # The device is said because a model may be made under torch.device("meta"), where no number has a value.
            initial_seed = int(torch.randint(2**63 - 1, (), device="cpu"))
        self._initial_seed = initial_seed
        self._somebodys_card: bytes | None = None

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:  # noqa: ARG002
        """Transformers' name of how these models attend; ours where none was said. Raises TwofoldError for a name that they do not have."""
        backend_of(requested_attention)
        return NAME if requested_attention is None else requested_attention

    def set_attn_implementation(
        self, attn_implementation: str | dict[str, str], allow_all_kernels: bool = False
    ) -> None:
        """Attend by "twofold", "sdpa" or "eager" from now on. Raises TwofoldError for another name, and changes nothing then."""
        super().set_attn_implementation(attn_implementation, allow_all_kernels)
        self.backend = backend_of(self.config._attn_implementation)
        for module in self.modules():
            if isinstance(module, Attention):
                module.backend = self.backend

    @classmethod
    def maybe_distribute_model(cls, model: nn.Module, distributed_config: Any, *meshes: Any) -> Any:
        """Split over devices, as Transformers does it. Raises TwofoldError where the model's heads cannot be split so."""
        if distributed_config is not None and distributed_config.tp_size > 1:
            check_tensor_parallel(cast("Self", model).config.spec, distributed_config.tp_size)
        return super().maybe_distribute_model(model, distributed_config, *meshes)

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], is_main_process: bool = True, *arguments: Any, **options: Any
    ) -> None:
        """As every Transformers model, and a card of what the tie costs beside the weights; a README.md of somebody's own stays as it is."""
        folder = Path(save_directory)
        self._somebodys_card = card.somebodys_card(folder)
        try:
            super().save_pretrained(save_directory, is_main_process, *arguments, **options)
            if is_main_process and folder.is_dir():
                if self._somebodys_card is not None:  # Transformers writes its own when it pushes
                    (folder / card.FILE).write_bytes(self._somebodys_card)
                else:
                    self._place_card(folder)
        finally:
            self._somebodys_card = None

    def _upload_modified_files(
        self, working_dir: str | os.PathLike[str], repo_id: str, *arguments: Any, **options: Any
    ) -> Any:
        # What is there now is the card that the repository has, or, where it has none, an empty one of Transformers'.
        self._place_card(Path(working_dir), repo_id)
        return super()._upload_modified_files(working_dir, repo_id, *arguments, **options)

    def _place_card(self, folder: Path, name: str = ".") -> None:
        """The card that the folder had, or a new one, unless there is one now that is somebody's own."""
        if card.somebodys_card(folder) is None:
            tags = [*(self.model_tags or []), *card.tags_of(folder)]
            dtype = _DTYPES.get(self.dtype, "bf16")
            made = card.card_text(self.config.spec, dtype=dtype, tags=tags, name=name)
            (folder / card.FILE).write_bytes(self._somebodys_card or made.encode())

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # A module that is not in the model yet (embeddings for more tokens) has no name.
        name = next((name for name, candidate in self.named_modules() if candidate is module), "")
        initialize(module, std=self.config.initializer_range, seed=self._initial_seed, name=name)

    def _output(self, kind: type[ModelOutput], options: Mapping[str, Any], **fields: Any) -> Any:
        """The result in the form the caller asked for."""
        record: Record = fields.pop("record")
        kept = {name: None if found is None else tuple(found) for name, found in vars(record).items()}
        output = kind(**fields, **kept)
        return_dict = options.get("return_dict")
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def _record(self, options: Mapping[str, Any], known: Collection[str] = ()) -> Record:
        """Where hidden states and attention weights are collected, if asked for. Raises TwofoldError for an option that would be ignored."""
        for name, value in options.items():
            if not (value is None or value is False or name in known or name in COMMON_OPTIONS):
                raise TwofoldError(f"{type(self).__name__} takes no argument {name!r}.")
        lists: list[list[Tensor] | None] = []
        for name in ("output_hidden_states", "output_attentions"):
            wanted = options.get(name)
            lists.append([] if (getattr(self.config, name) if wanted is None else wanted) else None)
        return Record(*lists)
