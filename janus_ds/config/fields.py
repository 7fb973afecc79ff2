"""Fields of a run: the types that they may have, each as data, and the faults of what was given for them.

The sections in `schema.py` and `schema_train.py` are pydantic dataclasses: frozen, strict (no text or truth
value as a number, but whole numbers as numbers), and finite. The text below a field in the source is its
documentation; `janus-ds explain KEY` prints it.

Faults are collected one by one and reported all together: a user with three mistakes in a recipe should read
about three mistakes, not about the first one three times. Readers add what they find to a :class:`FaultList`
and go on with a default value; :meth:`FaultList.raise_if_any` then reports everything in one
:class:`ConfigFaultsError`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from types import NoneType
from typing import Annotated, Any, get_args, get_origin

from pydantic import ConfigDict, Field
from pydantic_core import core_schema

from janus_ds.errors import ConfigError, suggestion

_LARGEST = 2**63 - 1

STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
"""Of every section."""

Count = Annotated[int, Field(gt=0, le=_LARGEST)]
Whole = Annotated[int, Field(ge=0, le=_LARGEST)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(ge=0, lt=1)]


class OneOf:
    """The choices of a text field, as in `Annotated[str, OneOf("a", "b")]`; for type checkers it is text."""

    def __init__(self, *choices: str) -> None:
        self.choices = choices

    def __get_pydantic_core_schema__(self, source: type, handler: Any) -> Any:
        return core_schema.literal_schema(list(self.choices))


_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
_LIMITS = {"gt": "more than", "ge": "at least", "lt": "less than", "le": "at most"}


@dataclass(frozen=True)
class FieldSpec:
    """One field of a run.

    Attributes:
        key: dotted, such as "optim.lr".
        type: str, int, float or bool.
        optional: whether it may be None.
        default: its value where nothing is given.
        choices: the values that a text field may take; empty: any.
        limits: of gt, ge, lt and le (as in :mod:`operator`), those that bound it.
        text: its documentation; the first line is a summary.
    """

    key: str
    type: type
    optional: bool
    default: Any
    choices: tuple[str, ...]
    limits: dict[str, float]
    text: str

    @property
    def type_name(self) -> str:
        """The type in words."""
        return _WORDS[self.type] + (" or null" if self.optional else "")

    def refusal(self, value: Any) -> tuple[str, str]:
        """Why a value that pydantic refused is not one of this field, and what to write instead."""
        if self.choices and isinstance(value, str):
            fix = suggestion(value, self.choices, f"use one of {', '.join(self.choices)}")
            return f"{self.key} has no value {shown(value)}", fix
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and (self.type is float or (self.type is int and isinstance(value, int))):
            limits = self._limits_in_words(value)
            what = f"{self.key} is {shown(value)}, but must be {limits}"
            return what, f"give a number that is {limits}"
        plain = self.type in (int, float) and isinstance(value, str) and value[:1].isdigit()
        digits = ", in plain decimal digits without quotes" if plain else ""
        what = f"{self.key} must be {self.type_name}, not {_described(value)}"
        return what, f"write {self.type_name}{digits}"

    def _limits_in_words(self, value: float) -> str:
        # The largest whole number is named only to a value above it.
        limits = {k: v for k, v in self.limits.items() if v != _LARGEST or value > _LARGEST}
        words = [f"{_LIMITS[name]} {limit}" for name, limit in limits.items()]
        if not limits or value != value or abs(value) == float("inf"):
            words.insert(0, "finite")
        return " and ".join(words).replace(str(_LARGEST), "2^63 - 1")


def shown(value: Any) -> str:
    """A value as messages show it: its repr, cut in the middle where it is long."""
    if isinstance(value, int) and abs(value) >= 10**60:
        return "a number of more than 60 digits"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:30]}...{text[-15:]}"


def _described(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, dict | list):
        return "a section" if isinstance(value, dict) else "a list"
    return f"{shown(value)} ({_WORDS.get(type(value), type(value).__name__)})"


def field_specs(owner: type, prefix: str = "") -> Iterator[FieldSpec]:
    """The fields of a run or section and of the sections in it, in the order of the source."""
    infos = owner.__pydantic_fields__  # type: ignore[attr-defined]
    for item in fields(owner):
        info = infos[item.name]
        if is_dataclass(info.annotation):
            yield from field_specs(info.annotation, f"{item.name}.")  # type: ignore[arg-type]
            continue
        kinds = [kind for kind in get_args(info.annotation) if kind is not NoneType]
        optional = NoneType in get_args(info.annotation)
        hint, marks = (kinds[0], []) if optional else (info.annotation, list(info.metadata))
        if get_origin(hint) is Annotated:
            hint, *notes = get_args(hint)
            marks += [mark for note in notes for mark in getattr(note, "metadata", [note])]
        choices = next((mark.choices for mark in marks if isinstance(mark, OneOf)), ())
        limits = {name: getattr(m, name) for m in marks for name in _LIMITS if hasattr(m, name)}
        yield FieldSpec(
            key=prefix + item.name,
            type=hint,
            optional=optional,
            default=None if item.default is MISSING else item.default,
            choices=choices,
            limits=limits,
            text=inspect.cleandoc(info.description or ""),
        )


@dataclass(frozen=True)
class Fault:
    """One mistake: what it is, where it stands (file and key), what to do about it."""

    what: str
    where: str
    fix: str


class ConfigFaultsError(ConfigError):
    """All mistakes of a configuration in one error; `faults` holds them one by one."""

    def __init__(self, faults: Iterable[Fault]) -> None:
        self.faults = tuple(faults)
        if len(self.faults) == 1:
            only = self.faults[0]
            super().__init__(only.what, only.where, only.fix)
            return
        lines = [
            f"\n  {number}. {fault.what}\n       where: {fault.where}\n       to do: {fault.fix}"
            for number, fault in enumerate(self.faults, start=1)
        ]
        super().__init__(
            f"{len(self.faults)} faults in the configuration:{''.join(lines)}",
            ", ".join(dict.fromkeys(f.where.partition(": ")[0] for f in self.faults)),
            "mend them all, then run `janus-ds check` again",
        )


@dataclass
class FaultList:
    """Collects faults, and remembers which keys are spoilt.

    A rule over several keys says nothing of use once one of them could not be read, so faults
    that depend on a spoilt key are left out.
    """

    faults: list[Fault] = field(default_factory=list)
    spoilt: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)
    """What is no fault, but not as it was written either."""

    def add(self, what: str, where: str, fix: str, keys: Iterable[str] = ()) -> None:
        """Add a fault, unless one of the keys that it speaks of is spoilt already."""
        keys = tuple(keys)
        if not self.spoilt.isdisjoint(keys):
            return
        self.faults.append(Fault(what, where, fix))
        self.spoilt.update(keys)

    def raise_if_any(self) -> None:
        """Report everything found so far.

        Raises:
            ConfigFaultsError: something was found.
        """
        if self.faults:
            raise ConfigFaultsError(self.faults)
