"""The options that say which model: a preset, and sizes that replace the preset's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from twofold.errors import TwofoldError
from twofold.presets import PRESETS
from twofold.spec import ModelSpec

PANEL = "Model"


def complete_preset(incomplete: str) -> list[str]:
    """Preset names for the shell's completion."""
    return [name for name in PRESETS if name.startswith(incomplete)]


def _size(text: str, letter: str) -> typer.models.OptionInfo:
    info: typer.models.OptionInfo = typer.Option(
        help=text, metavar=letter, rich_help_panel=PANEL, min=1, show_default=False
    )
    return info


Preset = Annotated[
    str,
    typer.Option(
        help="The model to start from.", metavar="NAME", autocompletion=complete_preset, rich_help_panel=PANEL
    ),
]
ModelFields = Annotated[
    list[str] | None,
    typer.Option(help="Any other field of a model, such as dropout=0.1.", metavar="NAME=VALUE", rich_help_panel=PANEL),
]
VocabSize = Annotated[int | None, _size("Tokens in the vocabulary.", "N")]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes as given on the command line; None keeps the preset's, or follows from a size that was given."""

    hidden_size: Annotated[int | None, _size("Width of the model.", "C")] = None
    layers: Annotated[int | None, _size("Number of layers.", "N")] = None
    heads: Annotated[int | None, _size("Query heads.", "H")] = None
    kv_heads: Annotated[int | None, _size("KV heads; as many as query heads when --heads is given alone.", "G")] = None
    head_dim: Annotated[int | None, _size("Width of a head; C / H when one of these is given alone.", "D")] = None
    mlp_size: Annotated[int | None, _size("Inner width of the MLP; in proportion to C when C is given alone.", "N")] = (
        None
    )
    latent_dim: Annotated[int | None, _size("Floats of a latent of which K and V are made (MLA).", "L")] = None

    def of(self, model: ModelSpec) -> ModelSpec:
        """The model with these sizes. Raises TwofoldError where they do not fit one another."""
        width = self.hidden_size or model.hidden_size
        heads = self.heads or model.num_attention_heads
        kv_heads = self.kv_heads or (heads if self.heads else model.num_key_value_heads)
        head_dim = self.head_dim or model.head_dim
        if not self.head_dim and (self.hidden_size or self.heads):
            if width % heads:
                raise TwofoldError(f"A width of {width} does not split into {heads} heads: say --head-dim.")
            head_dim = width // heads
        return model.with_changes(
            hidden_size=width,
            num_hidden_layers=self.layers or model.num_hidden_layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            latent_dim=self.latent_dim or model.latent_dim,
            intermediate_size=self.mlp_size or max(1, model.intermediate_size * width // model.hidden_size),
        )

    def given(self) -> bool:
        """Whether any size was given."""
        return self != Sizes()
