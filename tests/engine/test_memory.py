"""Room for photos, amounts of memory, and tiles."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lpmrf_fast.engine import memory
from lpmrf_fast.engine.memory import (
    MIN_TILE,
    Room,
    free_memory,
    give_back,
    is_out_of_memory,
    keep_blocks,
    parse_bytes,
)
from lpmrf_fast.engine.tiles import Box, blended, boxes, fill, tile_seed


def rounded(height, width):
    return math.ceil(height / 64) * 64, math.ceil(width / 64) * 64


@pytest.mark.parametrize(
    "text, expected", [(7, 7), ("8GB", 8e9), ("7.5 GiB", 7.5 * 2**30), ("800m", 8e8), ("2k", 2000), ("1 TiB", 2**40)]
)
def test_amounts_of_memory(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "1e9", "8 apples", None])
def test_what_is_no_amount_of_memory(text):
    with pytest.raises(ValueError, match="such as 8GB or 800MiB, got"):
        parse_bytes(text)


def test_free_memory_is_told_where_it_can_be():
    free = free_memory(torch.device("cpu"))
    assert free is None or 2**20 < free < 2**50


def test_a_containers_limit_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    free = free_memory(torch.device("cpu"))
    if free is None:
        pytest.skip("no /proc/meminfo")
    for limit, used, expected in (("3000000", "1000000", 2_000_000), ("1000", "2000", 0), ("max", "5", None)):
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        (tmp_path / "memory.current").write_text(f"{used}\n")
        found = free_memory(torch.device("cpu"))
        assert found == expected if expected is not None else found > 2_000_000


def test_large_blocks_are_used_again():
    """Every page of a new block is a page fault when it is first written; by default it is a new one every time."""
    resource = pytest.importorskip("resource")
    if not keep_blocks():
        pytest.skip("another allocator than glibc's")

    def faults():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.empty(48 * 2**20, dtype=torch.uint8).fill_(1)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    assert min(faults() for _ in range(8)) < 48 * 2**20 / resource.getpagesize() / 100
    give_back(torch.device("cpu"))


def test_what_counts_as_out_of_memory():
    assert is_out_of_memory(torch.OutOfMemoryError("x")) and is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"))
    assert not is_out_of_memory(RuntimeError("shape mismatch")) and not is_out_of_memory(ValueError("out of memory"))


# ---- room


def test_batches_follow_the_prediction():
    room = Room(32, rounded, budget=8 * 512 * 512 * 1000, bytes_per_pixel=1000)
    assert room.limit(512, 512) == 8 and room.limit(256, 256) == 32 and room.limit(1024, 1024) == 2
    assert Room(32, rounded).limit(4096, 4096) == 32


def test_out_of_memory_halves_a_size_and_is_remembered():
    room = Room(32, rounded)
    for expected in (16, 8, 4, 2, 1):
        assert room.shrink(512, 512, room.limit(512, 512)) and room.limit(512, 512) == expected
    assert room.limit(256, 256) == 32


def test_then_photos_are_cut_into_tiles_until_they_are_too_small():
    room = Room(1, rounded)
    assert room.tile(1024, 2048) is None
    size, areas = (1024, 2048), []
    while room.shrink(*size, 1):
        size = room.tile(1024, 2048)
        assert room.limit(1024, 2048) == 0 and size == rounded(*size)
        areas.append(size[0] * size[1])
    assert areas == sorted(areas, reverse=True) and len(areas) == len(set(areas)) and areas[-1] == MIN_TILE**2
    assert room.limit(256, 256) == 1
    assert not Room(1, rounded).shrink(128, 64, 1)


def test_the_prediction_may_ask_for_tiles_at_once():
    room = Room(8, rounded, budget=1024 * 1024 * 10, bytes_per_pixel=10)
    assert room.tile(1024, 1024) is None and room.limit(1024, 1024) == 1
    h, w = room.tile(3000, 5000)
    assert h * w <= 1.2 * 1024 * 1024 and room.limit(3000, 5000) == 0
    assert room.tile(64, 100_000)[0] == 64


# ---- tiles


@settings(max_examples=60, deadline=None)
@given(height=st.integers(1, 400), width=st.integers(1, 400), tile=st.tuples(st.integers(8, 200), st.integers(8, 200)))
def test_tiles_cover_every_pixel_with_overlap(height, width, tile):
    places = boxes(height, width, tile)
    assert len({(box.height, box.width) for box in places}) == 1
    seen = torch.zeros(height, width)
    for box in places:
        part = box.of(seen)
        assert part.shape == (box.height, box.width) == (min(height, tile[0]), min(width, tile[1]))
        part += 1
    assert seen.min() >= 1
    for axis, part in enumerate((places[0].height, places[0].width)):
        starts = sorted({box[axis] for box in places})
        assert all(b - a <= part - part // 8 for a, b in zip(starts, starts[1:]))


@settings(max_examples=30, deadline=None)
@given(height=st.integers(1, 150), width=st.integers(1, 150), side=st.integers(16, 64))
def test_cutting_and_blending_gives_the_photo_back(height, width, side):
    photo = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    places = boxes(height, width, (side, side))
    assert torch.equal(blended([box.of(photo) for box in places], places, height, width), photo)


def test_one_tile_is_the_photo_itself():
    photo = torch.randint(0, 256, (3, 9, 7), dtype=torch.uint8)
    (box,) = boxes(9, 7, None)
    assert box == Box(0, 0, 9, 7) and boxes(9, 7, (64, 64)) == [box]
    padded = torch.nn.functional.pad(photo, (0, 3, 0, 2))
    assert torch.equal(blended([padded], [box], 9, 7), photo)


def test_seams_have_no_step():
    """Two tiles that disagree by 100 levels: the way from one to the other is gradual."""
    places = boxes(8, 100, (8, 64))
    tiles = [torch.full((3, 8, 64), 50 + 100 * i, dtype=torch.uint8) for i in range(len(places))]
    row = blended(tiles, places, 8, 100)[0, 0].int()
    assert row[0] == 50 and row[-1] == 150 and row.diff().min() >= 0 and row.diff().max() <= 12


def test_tiles_have_noise_of_their_own_and_the_first_has_the_photos():
    seeds = [tile_seed(5, i) for i in range(100)]
    assert seeds[0] == 5 and len(set(seeds)) == 100 and all(-(2**63) <= s < 2**63 for s in seeds)
    assert tile_seed(-(2**63), 0) == -(2**63)


@pytest.mark.parametrize("size", [(1, 1), (1, 64), (2, 3), (50, 64), (64, 41), (64, 64)])
def test_photos_are_padded_as_the_pipeline_pads_them(pipe, photos, size):
    (photo,) = photos(size)
    pixels = torch.zeros(3, 3, 64, 64, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    fill(pixels, [photo, photo.permute(1, 2, 0).contiguous().permute(2, 0, 1)])
    expected = (pipe._padded(photo, (64, 64)) * 255).round().to(torch.uint8)
    assert torch.equal(pixels[0], expected) and torch.equal(pixels[1], expected) and not pixels[2].any()
