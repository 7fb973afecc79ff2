"""Names from outside never become commands or paths."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from janus_ds.cli.inspect import verify
from janus_ds.cli.prepare import prepare_data
from janus_ds.config.locations import (
    checked_name,
    deepspeed_file,
    join_location,
    location_key,
    recipe_file,
)
from janus_ds.config.schema import DataConfig
from janus_ds.data.stream import index
from janus_ds.data.stream.index import Manifest
from janus_ds.data.stream.open_dataset import open_data
from janus_ds.errors import DataError, UsageError
from tests.support.hostile import note

HOSTILE = (
    "x; touch {mark}; #",
    "$(touch {mark})",
    "`touch {mark}`",
    "x\ntouch {mark}",
    "../outside",
    "..",
    "a/../../b",
    "/etc",
    "",
    "-rf",
    ".hidden",
    "x\0y",
    "ä",
    "x" * 300,
)


def rename_split(path: Path, name: str) -> None:
    """Write a manifest anew with another name of the training split and the checksum that belongs to it."""
    body = json.loads(path.read_text())
    del body["checksum"], body["format_version"]
    body["splits"][name] = body["splits"].pop("train")
    index._save(path, body)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_manifest_cannot_run_commands_or_leave_its_folder(name: str, tiny: Path, tmp_path: Path) -> None:
    mark, data = tmp_path / "mark", Path(shutil.copytree(tiny, tmp_path / "data"))
    rename_split(data / "manifest.json", name.format(mark=mark))
    cache = str(tmp_path / "cache")
    for location in (str(data), f"pipe:cat {data}/{{}}", f"memory://{data}"):
        words = [location, "--set", f"data.cache_dir={cache}", "data.retries=0"]
        with pytest.raises(DataError):
            verify(words)
    with pytest.raises(DataError, match="no name of a split or a file"):
        Manifest.load(data)
    outside = {p.name for p in tmp_path.iterdir()} - {"data", "cache", "mark"}
    note("names that run a command", 4, mark.exists())
    note("names that write outside the folder", 4, len(outside))
    assert not mark.exists()
    assert not outside


@pytest.mark.parametrize("location", ["data", "http://host/a?sig=x", "pipe:cat a/{}"])
def test_what_is_joined_was_looked_at_before(location: str) -> None:
    for name in (n for n in HOSTILE if n != "x" * 300):
        with pytest.raises(DataError, match="cannot be its own"):
            join_location(location, name)
    assert "train/index.json" in join_location(location, "train/index.json").replace("{}", "index.json")


def test_the_user_may_still_name_any_split_that_is_one(tiny: Path, tmp_path: Path) -> None:
    assert checked_name("valid-2.de_en") == "valid-2.de_en"
    place = open_data(f"pipe:cat {tiny}/{{}}", DataConfig(cache_dir=str(tmp_path / "cache"), retries=0))
    assert place.split("train")[0].shards.folder.public == "pipe:cat ... {}"
    with pytest.raises(DataError, match="has no split"):
        place.split("../x")
    with pytest.raises(DataError, match=r"no split 'tset'.*\n.*manifest\.json\n.*name one of train, valid,"):
        open_data(str(tiny), DataConfig()).split("tset")


@pytest.mark.parametrize("place", ["s3://me:hush@bucket/novels", "https://host/run", "pipe:cat hush"])
def test_an_address_is_no_path(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be a folder `s3:` below the working folder, filled for hours."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("A cat.\n\nA dog.\n")
    with pytest.raises(UsageError, match="a path on this machine") as caught:
        prepare_data(["--input", "a.txt", "--vocab-size", "20", "--processes", "1", "--output", place])
    assert "hush" not in str(caught.value)
    with pytest.raises(UsageError, match="a path on this machine"):
        open_data("https://host/data", DataConfig(cache_dir=place))
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("address", ["https://[x/", "https://me:hush@\u2100/x"])
def test_an_address_that_is_none_is_refused(address: str, tmp_path: Path) -> None:
    words = ["--output", str(tmp_path / "out"), "--input", address]
    for use in (lambda: prepare_data(words), lambda: open_data(address, DataConfig(cache_dir=str(tmp_path)))):
        with pytest.raises(UsageError, match=r"address cannot be read\n.*https://\.\.\.\n.*SCHEME") as caught:
            use()
        assert "hush" not in str(caught.value)


AWS = "X-Amz-Algorithm=A&X-Amz-Credential={}&X-Amz-Date={}&X-Amz-Expires=60&X-Amz-Signature={}"
GOOGLE = "GoogleAccessId=me&Expires={}&Signature={}{}"
AZURE = "sv=2024&st={}&se={}&sr=b&sp=r&sig={}"


@pytest.mark.parametrize("signed", [AWS, GOOGLE, AZURE, "access_token={}&api-key={}&auth={}", "token={}{}{}"])
def test_an_address_that_is_signed_anew_is_the_same_input(signed: str) -> None:
    days = [signed.format(*words) for words in (("hush", "one", "two"), ("three", "four", "secret"))]
    plain, other = ("https://me:hush@h/get?part={}&author=a&{}".format(part, "{}") for part in (1, 2))
    keys = [location_key(plain.format(query)) for query in days]
    assert keys[0] == keys[1] != location_key(other.format(days[0]))
    assert keys[0].startswith("https://...@h/get?... ")
    assert not any(word in keys[0] for word in ("hush", "part", "author"))
    assert location_key(f"https://h/a.txt?{days[0]}") == "https://h/a.txt?..."
    assert location_key("https://h/a.txt") == "https://h/a.txt"


def test_the_key_of_a_command_tells_it_from_others_without_showing_it() -> None:
    keys = [location_key(f"pipe:cat {name}") for name in ("hush-1", "hush-2")]
    assert keys[0] != keys[1]
    assert keys[0].startswith("pipe:cat ... {} ")
    assert "hush" not in "".join(keys)


def test_a_folder_named_like_a_recipe_is_no_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as `data/` of `janus-ds prepare --output xsum`."""
    monkeypatch.chdir(tmp_path)
    for name in ("xsum", "zero2"):
        (tmp_path / name).mkdir()
    assert recipe_file("xsum").name == "glge_xsum.yaml"
    assert deepspeed_file("zero2").name == "zero2.json"
    (tmp_path / "iwslt").write_text("name: mine")
    assert recipe_file("iwslt") == Path("iwslt")
