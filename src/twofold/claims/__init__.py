"""Claims: what a paper says, what its readers ask, and what the results on disk make of it.

A claim is data (``claims/data/*.toml``): a statement, its source, and pieces of evidence, each with the rule by which its result is judged.
Nothing is decided by hand: :func:`judge` reads results and applies the rules. No torch.
"""

from twofold.claims.claim import Claim, load
from twofold.claims.kept import Kept
from twofold.claims.verdict import Judgement, judge

__all__ = ["Claim", "Judgement", "Kept", "judge", "load"]
