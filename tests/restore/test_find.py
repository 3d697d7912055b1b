"""Which files are meant by files, folders and globs, and where they go."""

import os
from pathlib import Path

import pytest

from lpmrf_fast.restore.find import find, looks_like_photo
from lpmrf_fast.restore.plan import beside, plan


@pytest.fixture
def tree(tmp_path, picture, monkeypatch):
    """photos/{a.png, B.JPG, sub/c.webp, sub/deeper/extensionless, notes.txt, .hidden.png, .git/d.png}"""
    top = tmp_path / "photos"
    (top / "sub" / "deeper").mkdir(parents=True)
    (top / ".git").mkdir()
    picture().save(top / "a.png")
    picture().save(top / "B.JPG")
    picture().save(top / "sub" / "c.webp")
    picture().save(top / "sub" / "deeper" / "extensionless", format="PNG")
    picture().save(top / ".hidden.png")
    picture().save(top / ".git" / "d.png")
    (top / "notes.txt").write_text("not a photo")
    monkeypatch.chdir(tmp_path)
    return top


def places(patterns, **options):
    found, empty = find(patterns, **options)
    return [source.relative.as_posix() for source in found], empty


def test_a_folder_gives_its_tree_without_other_and_hidden_files(tree):
    assert places(["photos"]) == (["B.JPG", "a.png", "sub/c.webp", "sub/deeper/extensionless"], [])


def test_a_named_file_is_taken_whatever_it_is(tree):
    assert places([tree / "a.png", "photos/notes.txt", "nowhere.png", "photos/.hidden.png"]) == (
        ["a.png", "notes.txt", "nowhere.png", ".hidden.png"],
        [],
    )


@pytest.mark.parametrize(
    "pattern, expected",
    [
        ("photos/*.png", ["a.png"]),
        ("photos/**/*.webp", ["sub/c.webp"]),
        ("photos/*", ["B.JPG", "a.png", "sub/c.webp", "sub/deeper/extensionless"]),
        ("photos/**", ["B.JPG", "a.png", "sub/c.webp", "sub/deeper/extensionless"]),
        ("phot?s", ["photos/B.JPG", "photos/a.png", "photos/sub/c.webp", "photos/sub/deeper/extensionless"]),
        ("photos/s*/c.webp", ["sub/c.webp"]),
    ],
)
def test_globs_keep_the_tree_below_their_fixed_part(tree, pattern, expected):
    assert places([pattern]) == (expected, [])


def test_a_file_whose_name_looks_like_a_glob_is_a_file(tree, picture):
    picture().save(tree / "a[1].png")
    assert places(["photos/a[1].png"]) == (["a[1].png"], [])


def test_a_photo_named_twice_is_found_once(tree):
    found, empty = places(["photos/a.png", "photos", os.path.abspath("photos/a.png"), "photos/*.png"])
    assert found.count("a.png") == 1 and len(found) == 4 and empty == []


def test_what_matches_nothing_is_named(tree, tmp_path):
    (tmp_path / "empty").mkdir()
    assert places(["photos/*.tif", "empty", ""]) == ([], ["photos/*.tif", "empty", ""])


def test_the_output_below_the_input_is_left_out(tree):
    everywhere, _ = places(["."])
    without, _ = places([".", "photos/*", "photos/sub/*"], leave_out=[Path("photos/sub")])
    assert "photos/sub/c.webp" in everywhere
    assert without == ["photos/B.JPG", "photos/a.png"]


def test_signatures_tell_photos_from_other_files():
    assert looks_like_photo(b"RIFF\x10\0\0\0WEBPVP8 ")
    assert not looks_like_photo(b"RIFF\x10\0\0\0WAVEfmt ")
    assert not looks_like_photo(b"%PDF-1.7\n")
    assert not looks_like_photo(b"%!PS-Adobe-3.0 E")


def outputs(patterns, output="out", **options):
    return [task.output.as_posix() for task in plan(find(patterns)[0], Path(output), **options)]


def test_outputs_mirror_names_and_get_a_suffix_where_there_is_none(tree):
    assert outputs(["photos"]) == [
        "out/B.JPG",
        "out/a.png",
        "out/sub/c.webp",
        "out/sub/deeper/extensionless.png",
    ]
    assert outputs(["photos"], ext="png")[:3] == ["out/B.png", "out/a.png", "out/sub/c.png"]
    assert outputs(["photos/a.png"], "result.jpg") == ["result.jpg"]


def test_two_photos_never_share_an_output(tree, picture):
    picture().save(tree / "sub" / "a.png")
    first, second = plan(find(["photos/a.png", "photos/sub/a.png"])[0], Path("out"))
    assert first.refused is None
    assert "already that of photos/a.png" in second.refused


def test_a_photo_is_never_its_own_output(tree):
    refused = [task.refused for task in plan(find(["photos"])[0], Path("photos"))]
    assert all("overwrite the photo itself" in reason for reason in refused[:3])
    assert refused[3] is None  # extensionless → extensionless.png


def test_posterior_means_go_beside_the_output(tmp_path):
    assert beside(tmp_path / "out") == tmp_path / "out-posterior-mean"
    assert beside(tmp_path / "face.png") == tmp_path / "face-posterior-mean.png"
