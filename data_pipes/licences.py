"""Which licences a dataset may hold: `--licence allow=CC0-1.0,CC-BY-4.0`, `--licence deny=CC-BY-NC-4.0`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import UserError
from .limits import Rejected

__all__ = ["LicenceFilter"]

_FORM = "write --licence allow=CC0-1.0,CC-BY-4.0 or --licence deny=CC-BY-NC-4.0"


@dataclass(frozen=True)
class LicenceFilter:
    """Licences by name, compared without case.

    allow: if any, these alone, and a file without a licence is refused.
    deny: all but these; a file without a licence is taken, unless `allow` refuses it.
    """

    allow: tuple[str, ...] = ()
    deny: tuple[str, ...] = ()

    @classmethod
    def parse(cls, words: Iterable[str]) -> LicenceFilter:
        """From the values of --licence. Raises UserError.

        Example: ["allow=CC0-1.0,CC-BY-4.0"] -> LicenceFilter(allow=("CC0-1.0", "CC-BY-4.0")).
        """
        named: dict[str, dict[str, str]] = {"allow": {}, "deny": {}}
        for word in words:
            verb, _, listed = word.partition("=")
            names = [" ".join(name.split()) for name in listed.split(",")]
            if verb.strip().lower() not in named or not all(names):
                raise UserError(f"--licence '{word}' is not understood: {_FORM}")
            named[verb.strip().lower()] |= {name.casefold(): name for name in names}
        if both := sorted(named["allow"].keys() & named["deny"].keys()):
            raise UserError(f"--licence both allows and denies '{named['allow'][both[0]]}': leave one out")
        # Sorted, so that the order they were given in does not make another dataset.
        return cls(*(tuple(name for _, name in sorted(names.items())) for names in named.values()))

    def __bool__(self) -> bool:
        return bool(self.allow or self.deny)

    def identity(self) -> dict[str, list[str]]:
        """What tells one filter from another: without case, as they are compared."""
        return {
            verb: [name.casefold() for name in names]
            for verb, names in (("allow", self.allow), ("deny", self.deny))
            if names
        }

    def refusal(self, licence: str | None) -> Rejected | None:
        """Why a file of this licence is left out, or None if it is taken."""
        if licence is None:
            if not self.allow:
                return None
            return Rejected(
                "its licence is not given, so it is not allowed", "write it into the captions file's column 'licence'"
            )
        allowed = {name.casefold(): name for name in self.allow}
        denied = {name.casefold() for name in self.deny}
        key = " ".join(licence.casefold().split())
        if key not in denied and (key in allowed or not allowed):
            return None
        reason = f"its licence '{licence}' is not allowed"
        if key in denied:
            return Rejected(reason, "leave it out of --licence deny=… if you may use it")
        # No looser than that: CC-BY-NC-4.0 is close to CC-BY-4.0, and must not be taken for it.
        if alike := [name for other, name in allowed.items() if _bare(other) == _bare(key)]:
            return Rejected(reason, f"write '{alike[0]}' in the captions file if that is the one meant")
        return Rejected(reason, "add it to --licence allow=… if you may use it")

    def check_given(self, licences: Iterable[str | None]) -> None:
        """Raises UserError where some licence is needed and none of a whole dataset's files has one."""
        if self.allow and not any(licences):
            raise UserError(
                "--licence allow=… needs to know the files' licences and not one is given: give --captions a file "
                "with a column 'licence'"
            )


def _bare(name: str) -> str:
    return "".join(filter(str.isalnum, name))
