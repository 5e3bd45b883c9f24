"""Pseudonyms and splits: keyed, stable, and people tied together stay together."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections import Counter
from pathlib import Path

import pytest

from data_prep.identity import load_key, pseudonym
from data_prep.splits import LINK, check, group_people, settle, split_of
from neurojepa.errors import ConfigError

KEY = b"0123456789abcdef0123456789abcdef"


def test_pseudonym_is_the_keyed_hash():
    expected = hmac.new(KEY, b"ukb|1000001", hashlib.sha256).hexdigest()[:16]
    assert pseudonym(KEY, "ukb", "1000001") == expected
    others = {pseudonym(KEY, "abcd", "1000001"), pseudonym(KEY, "ukb", "1000002"),
              pseudonym(KEY[::-1], "ukb", "1000001")}
    assert len(others | {expected}) == 4


def test_default_key_is_made_once_and_private(tmp_path: Path, monkeypatch, capsys):
    file = tmp_path / "deep" / "key"
    monkeypatch.setenv("NEUROJEPA_KEY_FILE", str(file))
    first = load_key(None)
    printed = capsys.readouterr().out
    assert str(file) in printed and first.decode() not in printed
    assert file.stat().st_mode & 0o777 == 0o600 and len(first) == 64
    assert load_key(None) == first and capsys.readouterr().out == ""


@pytest.mark.parametrize("content, mode, message", [
    (None, 0, "no such key"), (b"short", 0o600, "too few"), (KEY, 0o644, "chmod 600")],
    ids=["missing", "few", "open"])  # a key's text would come into the path
def test_a_bad_key_is_refused(tmp_path: Path, content, mode, message):
    file = tmp_path / "key"
    if content is not None:
        file.write_bytes(content)
        os.chmod(file, mode)
    with pytest.raises(ConfigError, match=message) as error:
        load_key(str(file))
    assert content is None or content.decode() not in str(error.value)


def test_groups_are_transitive_and_named_stably():
    ties = [("a", "f:1"), ("b", "f:1"), ("b", "g:2"), ("c", "g:2"), ("d", "f:9")]
    groups = group_people("abcde", ties)
    assert groups["a"] == groups["b"] == groups["c"] == "tag:f:1"
    assert len({groups["a"], groups["d"], groups["e"]}) == 3
    more = group_people("abcdexyz", [*ties[::-1], ("x", "f:9"), ("y", "f:1"), ("z", "g:2")])
    assert {name: more[name] for name in "abcde"} == groups


def test_a_linked_group_is_named_by_its_link_and_split_alike_everywhere():
    groups = group_people("ab", [("a", "a family"), ("a", LINK + "p"), ("b", "a family")])
    assert set(groups.values()) == {f"tag:{LINK}p"}
    names = [f"tag:{LINK}{number}" for number in range(50)]
    assert [split_of(KEY, "c", name) for name in names] == [split_of(KEY, "d", name)
                                                            for name in names]
    own = [f"tag:{number}" for number in range(50)]
    assert [split_of(KEY, "c", name) for name in own] != [split_of(KEY, "d", name) for name in own]


def test_people_keep_what_they_had_and_the_last_split_wins():
    groups = {"a": "g", "b": "g", "c": "h", "d": "new"}
    settled = settle(KEY, "c", groups=groups, earlier={"a": "train", "b": "val", "c": "test",
                                                       "gone": "train"})
    assert settled == {"g": "val", "h": "test", "new": split_of(KEY, "c", "new")}


def test_split_shares_and_key():
    names = [f"person:{number}" for number in range(20_000)]
    splits = [split_of(KEY, "c", name) for name in names]
    shares = {name: count / len(names) for name, count in Counter(splits).items()}
    assert shares == pytest.approx({"train": 0.7, "val": 0.1, "test": 0.2}, abs=0.015)
    other = [split_of(KEY[::-1], "c", name) for name in names]
    agreement = sum(a == b for a, b in zip(splits, other, strict=True)) / len(names)
    assert agreement == pytest.approx(0.7**2 + 0.1**2 + 0.2**2, abs=0.02)


def test_check_names_people_and_families_in_two_splits():
    def row(participant: str, family: str, split: str) -> dict[str, str]:
        return {"participant": participant, "family": family, "split": split}

    assert check([row("p", "f", "train"), row("p", "f", "train"), row("q", "g", "test")]) == []
    problems = check([row("p", "f", "train"), row("q", "f", "test"), row("r", "h", "val"),
                      row("r", "h", "val")])
    assert len(problems) == 1 and "family f is in the splits test, train" in problems[0]
    assert len(check([row("p", "f", "train"), row("p", "f", "val")])) == 2
