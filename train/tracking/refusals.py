"""What MLflow refuses of a run: it is sent no more, and keeps nothing else from being sent."""

from collections.abc import Callable, Sequence
from typing import Any

from train.tracking.mlflow_errors import explain, is_about_values, may_pass

ALL = "all"  # in place of names


class Refusals:
    """By kind, as in "metrics": the names that are refused, and why the first of them is."""

    def __init__(self) -> None:
        self.by_kind: dict[str, tuple[list[str], str]] = {}
        self.store = self.recorded = ""
        """URIs of the store, and of the one that the run was logged to before, for the way out."""

    def names(self, kind: str) -> list[str]:
        return self.by_kind.get(kind, ([], ""))[0]

    def add(self, kind: str, names: Sequence[str], error: Exception) -> None:
        self.by_kind.setdefault(kind, ([], explain(error, self.store, self.recorded)))[0].extend(names)

    def sentences(self) -> dict[str, str]:
        """One for each kind."""
        return {
            kind: f"MLflow refuses {kind} of this run ({names[0]}"
            + (f" and {len(names) - 1} more" if names[1:] else "")
            + f"): {reason}"
            for kind, (names, reason) in self.by_kind.items()
        }

    def attempt(self, kind: str, send: Callable[[], None], name: str = ALL) -> None:
        """Call `send`, unless MLflow refused it before.

        Raises:
            Exception: whatever `send` does, if it may pass.
        """
        if name in self.names(kind):
            return
        try:
            send()
        except Exception as error:  # mlflow raises its own, requests' and SQLAlchemy's exceptions
            if may_pass(error):
                raise
            self.add(kind, [name], error)

    def send_each(self, kind: str, items: Sequence[Any], send: Callable[[Sequence[Any]], None]) -> None:
        """Send parameters or metrics at once, or, where MLflow refuses some keys, all others."""
        items = [item for item in items if item.key not in self.names(kind)]
        if not items:
            return
        try:
            send(items)
        except Exception as error:
            if may_pass(error) or not is_about_values(error):
                raise
            keys = sorted({item.key for item in items})
            if len(keys) == 1:
                self.add(kind, keys, error)
                return
            first = set(keys[: len(keys) // 2])
            self.send_each(kind, [item for item in items if item.key in first], send)
            self.send_each(kind, [item for item in items if item.key not in first], send)
