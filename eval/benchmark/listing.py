"""`eval ls`: the protocols, and the evaluators with what weights are present."""

from __future__ import annotations

from ..evaluators.registry import list_evaluators
from .protocol import load_protocol, protocol_names

__all__ = ["show"]


def show(what: str) -> None:
    """Print what there is. what: "all", "protocols" or "evaluators"."""
    if what in ("all", "protocols"):
        print("Protocols (--protocol NAME, or a YAML file of this form):\n")
        for name in protocol_names():
            _show_protocol(name)
    if what in ("all", "evaluators"):
        print("Evaluators (--evaluator NAME; also any folder, or ARCH=FILE); + has its weights on this machine:\n")
        for row in list_evaluators():
            print(f"  {'+' if row.here else '-'} {row.name}  {row.architecture}, {row.licence}: {row.where}")
        print()


def _show_protocol(name: str) -> None:
    protocol = load_protocol(name)
    rule = protocol.gallery
    gallery = f"{rule.kind} gallery" + (f" of {rule.size}" if rule.size else "")
    views = len(protocol.cameras.azimuths_deg)
    print(f"  {name}  {protocol.hash[:12]}  {protocol.about}")
    print(
        f"      {views} view{'s' * (views > 1)} at elevation {protocol.cameras.elevation_deg:g}, {protocol.resolution} "
        f"pixels, {' and '.join(protocol.shadings)}, {gallery}, {protocol.aggregation}"
    )
    print(f"      {protocol.source}\n")
