"""The one exception that means "you can mend this".

A UserError carries one sentence: what was expected, what came, what to do. The command line prints it and exits with
code 2; a library caller catches it as a ValueError. A mistake of ours stays an assert or a traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Input, configuration or environment that the user can mend; the message is one sentence."""


def unknown_name(kind: str, got: str, known: Iterable[str]) -> UserError:
    """An error for a name that is not in `known`, with the nearest one that is."""
    names = sorted(known)
    near = difflib.get_close_matches(got, names, n=1, cutoff=0.5)
    remedy = f"did you mean {near[0]!r}?" if near else f"known are: {', '.join(names)}."
    return UserError(f"unknown {kind} {got!r}; {remedy}")
