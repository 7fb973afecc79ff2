"""Where things lie, as users name them: data, and the recipes, DeepSpeed files and models of the package.

Data is a folder, an address or a command; alone or several with weights. Addresses may hold passwords and
signatures. Whatever is printed or recorded goes through :func:`public_location`; what is opened goes through
:func:`expanded`. What comes with the package is named by its path, or by a name (`--recipe iwslt`).
"""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import SplitResult, parse_qsl, urlencode, urlsplit, urlunsplit

from janus_ds.errors import ConfigError, DataError, UsageError, suggestion
from janus_ds.io import fingerprint_of

if TYPE_CHECKING:
    from janus_ds.config.fields import FaultList

PIPE = "pipe:"
"""Start of a location that is a shell command; {} in it stands for a file's name."""

SECRET_KEYS = ("data.path", "data.valid_path")
"""Fields of a run that may hold secrets."""

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}", re.ASCII)
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_WEIGHTED = re.compile(r"(.+)=([0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?)", re.DOTALL)
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_SIGNING = re.compile(
    r"x-(amz|goog|oss)-(?!process).*|(aws|oss|google)access(key)?id|key-pair-id|policy|"
    r"(.*[-_])?((access|auth|id|session)?token|sig|signature|credentials?|expires?|auth|authorization|"
    r"api[-_]?key|secret|pass|passwd|password)",
    re.IGNORECASE,
)
"""Parts of a query that say who may read and until when, not what is read."""
_SIGNING_AZURE = re.compile(r"s[eiprstv]|sip|spr|srt|sk(e|s|t|v|oid|tid)")
"""Further ones beside Azure's `sig`."""


class WeightedLocation(NamedTuple):
    """One source of samples and its share of them, relative to the other sources' weights."""

    location: str
    weight: float


def is_remote(location: str) -> bool:
    """Whether files must be fetched before they can be read: an address or a command."""
    return location.startswith(PIPE) or bool(_SCHEME.match(location))


def parse_locations(text: str) -> tuple[WeightedLocation, ...]:
    """The sources that `--data` or `data.path` name: one, or `LOCATION=WEIGHT,LOCATION=WEIGHT`.

    Text is a mixture only if every part between commas ends with a weight and there are two or more, so
    that an ordinary folder or address may hold both signs.

    Raises:
        ConfigError: a weight is 0 or not a number.
    """
    parts = [_WEIGHTED.fullmatch(part.strip()) for part in text.split(",")]
    found = [(os.path.expanduser(match[1].strip()), float(match[2])) for match in parts if match]
    if len(parts) < 2 or len(found) < len(parts) or os.path.exists(text):
        return (WeightedLocation(text, 1.0),)
    for location, weight in found:
        if not (weight > 0 and math.isfinite(weight)):
            raise ConfigError(
                f"a source has the weight {weight}",
                f"data.path: {public_location(location)}",
                "give each source a weight above 0, or leave it out",
            )
    return tuple(WeightedLocation(location, weight) for location, weight in found)


def checked_name(name: object) -> str:
    """A name from a manifest or an index: letters, digits, `_`, `.` and `-`, not starting with `.` or `-`.

    Names are joined to paths, addresses and shell commands, so nothing else is taken: no `/`, no `..`.

    Raises:
        ValueError: anything else.
    """
    if isinstance(name, str) and _NAME.fullmatch(name):
        return name
    raise ValueError(f"{str(name)[:60]!r} is no name of a split or a file")


def join_location(location: str, name: str) -> str:
    """Where a file of a directory lies; an address keeps its query, a command its {}.

    Args:
        name: below it: names as :func:`checked_name` takes them, `/` between them.

    Raises:
        DataError: the name holds anything else, such as `..` or shell syntax.
    """
    try:
        for part in name.split("/"):
            checked_name(part)
    except ValueError as error:
        raise DataError(
            f"the data names a file that cannot be its own: {error}",
            public_location(location),
            "do not use this data; prepare it again, or ask who published it",
        ) from None
    if location.startswith(PIPE):
        return location.replace("{}", f"{quote(name)}/{{}}")
    if not is_remote(location):
        return str(Path(location) / name)
    parts = split_address(location)
    path = f"{parts.path.rstrip('/')}/{name}"
    return urlunsplit(parts._replace(path=path))


def split_address(address: str) -> SplitResult:
    """The parts of an address.

    Raises:
        UsageError: it is none, such as `https://[x/`.
    """
    try:
        return urlsplit(address)
    except ValueError:  # its text can quote a password
        fix = "give it as SCHEME://HOST/PATH; [ and ] stand around an IPv6 address alone"
        raise UsageError("the address cannot be read", public_location(address), fix) from None


def expanded(location: str) -> str:
    """An address with ${NAME} replaced; commands are left to the shell.

    Raises:
        ConfigError: a variable is not set.
    """
    if location.startswith(PIPE) or not is_remote(location):
        return location

    def value(match: re.Match[str]) -> str:
        if match[1] not in os.environ:
            raise ConfigError(
                f"the environment has no {match[1]}",
                f"data.path: {public_location(location)}",
                f"export {match[1]} before the start, on every host",
            )
        return os.environ[match[1]]

    return _VARIABLE.sub(value, location)


def public_location(text: str) -> str:
    """A location or mixture as it may be shown: without passwords, queries and a command's arguments.

    Also a word of a command line that holds one, such as `data.path=https://me:secret@host/x`.
    """
    if not any(mark in text for mark in ("://", PIPE)):
        return text
    pieces = [_WEIGHTED.fullmatch(part.strip()) for part in text.split(",")]
    if len(pieces) > 1 and all(pieces):
        return ",".join(f"{_public(match[1])}={match[2]}" for match in pieces if match)
    return _public(text)


def location_key(location: str) -> str:
    """A file's address or command as a preparation remembers it: :func:`public_location`, and a short
    fingerprint of the command or the query that it hides.

    Passwords, signatures and their times do not count: an address that is signed anew stays the same input.
    """
    hidden = location if location.startswith(PIPE) else _unsigned_query(location)
    mark = f" {fingerprint_of(os.fsencode(hidden))[:12]}" if hidden else ""
    return f"{public_location(location)}{mark}"


def _unsigned_query(address: str) -> str:
    parts = split_address(address)
    query = sorted(parse_qsl(parts.query, keep_blank_values=True))
    rules = (_SIGNING, _SIGNING_AZURE) if "sig" in dict(query) else (_SIGNING,)
    kept = [pair for pair in query if not any(rule.fullmatch(pair[0]) for rule in rules)]
    return urlencode(kept) + parts.fragment


def _public(location: str) -> str:
    found = re.search(f"{PIPE}|{_SCHEME.pattern}", location)
    if found is None:
        return location
    before, address = location[: found.start()], location[found.start() :]
    if address.startswith(PIPE):
        words = address.removeprefix(PIPE).split()
        return f"{before}{PIPE}{words[0]} ... {{}}" if words else f"{before}{PIPE}"
    try:
        parts = urlsplit(address)
    except ValueError:
        return f"{before}{found[0]}..."
    hidden = "..." * bool(parts.query or parts.fragment)
    return before + urlunsplit(SplitResult(parts.scheme, _public_host(parts), parts.path, hidden, ""))


def _public_host(parts: SplitResult) -> str:
    user, at, host = parts.netloc.rpartition("@")
    # `${NAME}` says where the secret is, not what it is.
    kept = user if _VARIABLE.sub("", user).strip(":") == "" else "..."
    return f"{kept}{at}{host}"


# What comes with the package

DEMO, DENOISER = "demo", "denoiser"
"""The models that the package ships: German to English, both ways; an English AR denoiser to start from."""

_PACKAGE = Path(__file__).parents[1]
_IN_CHECKOUT = {"recipes": "launch/recipes", "ds_configs": "ds_configs"}
_SUFFIXES = {"recipes": ".yaml", "ds_configs": ".json"}
_PREFIXES = ("", "nmt_", "glge_")
_MOST_BYTES = 1 << 20


def user_path(text: str) -> Path:
    """A path from the command line; a leading ~ is the user's home, also in `--option=~/file`.

    Raises:
        UsageError: it is an address or a command, as a path a folder called `s3:`; or empty, as a path the
            working folder.
    """
    if not text.strip():
        what = "an empty path is given, as where a variable of the shell is not set"
        raise UsageError(what, "the command line", "give the path, or . for the working folder")
    if is_remote(text):
        what = "this has to be a path on this machine, not an address or a command"
        raise UsageError(what, public_location(text), "give a path, and copy to and from other places")
    return Path(os.path.expanduser(text))


def packaged_folder(kind: str) -> Path:
    """The folder of "recipes" or "ds_configs": beside the modules if installed, else in the checkout."""
    installed = _PACKAGE / kind
    return installed if installed.is_dir() else _PACKAGE.parent / _IN_CHECKOUT[kind]


def recipe_file(text: str) -> Path:
    """The recipe that is meant: a path, or a name such as quickstart, iwslt or xsum."""
    return _named(text, "recipes")


def deepspeed_file(text: str) -> Path:
    """The DeepSpeed file that is meant: a path, or a name such as zero2."""
    return _named(text, "ds_configs")


def model_path(path: str | Path) -> Path:
    """The run that is meant: a path, or the name of a model that the package ships, if no folder has it."""
    path = user_path(str(path))
    return packaged_model(str(path)) if str(path) in (DEMO, DENOISER) and not path.is_dir() else path


def packaged_model(name: str) -> Path:
    """A model that the package ships, whatever folders there are."""
    return _PACKAGE / "assets" / name


def tokenizer_name(text: str) -> str:
    """A tokenizer as it was named, ~ expanded; for a model that the package ships, the folder of its own."""
    model = model_path(text)
    return os.path.expanduser(text) if model == user_path(text) else str(model / "tokenizer")


def read_text(path: Path, what: str, example: str, faults: FaultList) -> str | None:
    """The text of a file of settings, a byte-order mark included; None with a fault.

    Args:
        what: what messages call it.
        example: a path of such a file; names of neighbours with its ending are suggested.
    """
    if path.is_fifo() and Path("/dev") not in path.parents:
        # To open it would wait for a writer, deaf to signals. A shell's <(COMMAND) is one of /dev/fd.
        faults.add(f"{what} is a named pipe, which is not read", str(path), f"give the path of {example}")
        return None
    try:
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
        if len(data) > _MOST_BYTES:
            faults.add(f"{what} is larger than {_MOST_BYTES:,} bytes", str(path), f"give {example}")
            return None
        if b"\0" not in data:
            return data.decode("utf-8")
        faults.add(f"{what} is not UTF-8 text: it has NUL bytes, as UTF-16", str(path), "save it as UTF-8")
    except OSError as error:
        suffix = Path(example).suffix
        if path.suffix or len(path.parts) > 1:
            names, fix = [p.name for p in path.parent.glob(f"*{suffix}")], f"give the path of {example}"
        else:
            names = _packaged_names(suffix)
            fix = f"give a path, or one of the names {', '.join(names)}"
        fix = suggestion(path.name, names, fix)
        faults.add(f"{what} cannot be read: {error.strerror}", str(path), fix)
    except UnicodeDecodeError as error:
        faults.add(f"{what} is not UTF-8 text: {error.reason}", str(path), "save it as UTF-8")
    return None


def _packaged_names(suffix: str) -> list[str]:
    """The names of the recipes (".yaml") or DeepSpeed files (".json") that come with the package."""
    kind = next(kind for kind, ending in _SUFFIXES.items() if ending == suffix)
    stems = [file.stem for file in packaged_folder(kind).glob(f"*{suffix}")]
    return sorted({stem.removeprefix("nmt_").removeprefix("glge_") for stem in stems})


def _named(text: str, kind: str) -> Path:
    path = user_path(text)
    if path.is_file() or path.suffix or len(path.parts) > 1:
        return path
    files = (packaged_folder(kind) / f"{prefix}{text}{_SUFFIXES[kind]}" for prefix in _PREFIXES)
    return next((file for file in files if file.is_file()), path)
