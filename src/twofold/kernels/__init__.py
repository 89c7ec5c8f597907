"""Attention over projections that are already made: one signature, backends that each fill one file, and one function that chooses.

A backend is a module with ``NAME``, ``supports(problem) -> str`` (empty, or why not) and ``attend(inputs) -> Tensor``; the order of
``BACKENDS`` is the order in which ``auto`` tries them. Where it could serve but others do it as well, it may say so by ``pays(problem) -> str``: ``auto`` then
passes over it, and who asks for it by name is served. Kernels import nothing of ours but errors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from twofold.errors import TwofoldError
from twofold.kernels import folded, native, reference, scaled_dot_product, triton_decode, triton_prefill
from twofold.kernels.inputs import Inputs, Mask, Problem, Rotation

__all__ = ["BACKENDS", "Choice", "Inputs", "Mask", "Problem", "Rotation", "attend", "check_name", "choose"]


@dataclass(frozen=True, kw_only=True)
class Backend:
    """A way to compute; ``supports`` answers with the reason against, or nothing, and ``pays`` with one that only ``auto`` minds."""

    attend: Callable[[Inputs], Tensor]
    supports: Callable[[Problem], str]
    pays: Callable[[Problem], str] = lambda _: ""


BACKENDS: Mapping[str, Backend] = {
    module.NAME: Backend(attend=module.attend, supports=module.supports, pays=getattr(module, "pays", Backend.pays))
    for module in (native, triton_decode, triton_prefill, scaled_dot_product, reference, folded)
}


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which backend serves a problem, why, and why those tried before it do not (name -> reason)."""

    name: str
    why: str
    refused: Mapping[str, str]


def check_name(backend: str) -> None:
    """Raise TwofoldError for a name that is neither ``auto`` nor a backend's."""
    if backend != "auto" and backend not in BACKENDS:
        raise TwofoldError(f"There is no attention backend {backend!r}: use auto or one of {', '.join(BACKENDS)}.")


def choose(problem: Problem, backend: str = "auto") -> Choice:
    """The backend for a problem. Raises TwofoldError if the one that was asked for cannot serve it; nothing is replaced silently."""
    check_name(backend)
    refused: dict[str, str] = {}
    for name in BACKENDS if backend == "auto" else (backend,):
        if reason := _against(name, problem, minds_pay=backend == "auto"):
            refused[name] = reason
            continue
        why = "asked for" if backend != "auto" else f"the first of {', '.join(BACKENDS)} that serves this problem"
        return Choice(name=name, why=why, refused=refused)
    reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
    raise TwofoldError(f"No attention backend can serve this ({reasons}): use backend='auto'.")


def _against(name: str, problem: Problem, *, minds_pay: bool) -> str:
    """Why a backend is not chosen; empty: it is."""
    if problem.needs_weights and name != reference.NAME:
        return "it keeps no attention weights"
    reason = BACKENDS[name].supports(problem)
    return BACKENDS[name].pays(problem) if minds_pay and not reason else reason


def attend(inputs: Inputs, backend: str = "auto") -> Tensor:
    """[B, H, T, D] by the backend that :func:`choose` names."""
    return BACKENDS[choose(inputs.problem, backend).name].attend(inputs)
