"""Names of files: images in any case and form, what is hidden, how the rest is counted."""

from __future__ import annotations

import pytest

from data_prep.filenames import image_ending, is_hidden, is_partner, other_file, partners, stem


@pytest.mark.parametrize(("name", "ending"), [
    ("a.nii", "nii"), ("a.NII.GZ", "nii.gz"), ("a.Nii.Gz", "nii.gz"), ("a.b.nii.bz2", "nii.bz2"),
    ("a.nii.zst", "nii.zst"), ("a.MGZ", "mgz"), ("a.mgh.gz", "mgh.gz"), ("a.hdr", "hdr"),
    ("a.img", None), ("a.nii.gz.part", None), ("nii.gz.txt", None), ("anii", None),
    ("a.nii.xz", None)])
def test_images_by_their_ending(name: str, ending: str | None) -> None:
    assert image_ending(name) == ending
    if ending:
        assert f"{stem(name)}.{ending}".lower() == name.lower()


@pytest.mark.parametrize(("name", "tried"), [
    ("a.hdr", "a.img"), ("a.hdr", "a.img.gz"), ("a.HDR", "a.IMG"), ("a.hdr.gz", "a.img.gz"),
    ("a.img", "a.hdr"), ("x [1]/a.img.gz", "x [1]/a.hdr.gz"), ("a.IMG", "a.HDR")])
def test_partners(name: str, tried: str) -> None:
    assert tried in partners(name) and is_partner(name) is (".img" in name.lower())


def test_only_pairs_have_partners() -> None:
    assert partners("a.nii") == partners("a") == []


def test_hidden() -> None:
    hidden = ["._a.nii", ".DS_Store", "__MACOSX/a.nii", "x/.git/a", "x/._y.nii.gz", ".x/a"]
    assert all(map(is_hidden, hidden))
    assert not any(map(is_hidden, ["a.nii", "x/a.b/c", "__MACOS/a", "a._b"]))


def test_other_files_are_counted_by_their_ending() -> None:
    assert [other_file(name) for name in ("a.XML", "a.tar.gz", "a.dtseries.nii", "README",
                                          "a b.surf.gii", "T1w.nii.gz~", "x.1.2.840.113",
                                          "a.7z", ".x")] == [
        "xml file", "tar.gz file", "dtseries.nii file", "file without an ending", "surf.gii file",
        "gz~ file", "file without an ending", "7z file", "x file"]
