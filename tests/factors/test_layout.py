"""Laws of the order of blocks: every block is where its factor says, and no training fills the memory with indices."""

from __future__ import annotations

import tracemalloc
from itertools import combinations

import pytest
import torch

from lightning_thor.factors import layout
from lightning_thor.factors.layout import SIDES, FactorLayout, Index
from lightning_thor.linalg.block_diagonal import diagonal, partition

CPU = torch.device("cpu")
SHAPES = [
    (partition(8, 4), partition(6, 4)),
    (None, diagonal(5)),
    (partition(8, 4), partition(6, 4)),
    (diagonal(7), partition(12, 4)),
]


def numbers_in(index: Index) -> list[int]:
    return list(range(index.start, index.stop)) if isinstance(index, slice) else index.tolist()


@pytest.mark.parametrize("stored", [(0, 1, 2, 3), (0, 2), (1,), ()])
def test_an_index_names_the_blocks_of_its_layers_and_their_factors(stored: tuple[int, ...]) -> None:
    made = FactorLayout(SHAPES, CPU)
    made.set_inverse_owner(stored)
    starts, n_before = {}, 0
    for size, n in made.n_stored.items():
        starts[size], n_before = n_before, n_before + n
    for layers in (some for n in range(1, 5) for some in combinations(range(4), n)):
        index = made.index(layers)
        places = {(size, number) for size, blocks in index.blocks.items() for number in numbers_in(blocks)}
        expected = {}
        for layer in layers:
            for side, _ in made.factors(layer):
                size, blocks = made.offset(layer, side)
                expected |= {(size, n): 2 * layer + SIDES.index(side) for n in range(blocks.start, blocks.stop)}
        assert places == expected.keys()
        assert index.lengths == [len(numbers_in(blocks)) for blocks in index.blocks.values()]
        assert index.owners.tolist() == [
            expected[size, number] for size, blocks in index.blocks.items() for number in numbers_in(blocks)
        ]
        rows = iter(numbers_in(index.rows))
        of_stored = dict(zip(index.stored, index.stored_owners.split(index.stored_lengths), strict=True))
        for size, (blocks, inverses) in index.stored.items():
            assert of_stored[size].tolist() == [expected[size, number] for number in numbers_in(blocks)]
            for owner, place in zip(of_stored[size].tolist(), numbers_in(inverses), strict=True):
                own = made.offset(owner // 2, SIDES[owner % 2], stored=True)
                assert own[0] == size
                assert own[1].start <= place < own[1].stop
                assert next(rows) == starts[size] + place
        assert list(rows) == []
        assert set(of_stored) == {size for layer in layers if layer in stored for size in sizes_of(made, layer)}


def sizes_of(made: FactorLayout, layer: int) -> set[int]:
    return {one.size for _, one in made.factors(layer)}


def test_as_many_indices_are_remembered_as_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "MOST_INDICES", 2)
    made = FactorLayout(SHAPES, CPU)
    first, second = made.index((0,)), made.index((1,))
    assert made.index((0,)) is first
    third = made.index((2,))
    assert made.index((1,)) is second
    assert made.index((2,)) is third
    assert made.index((0,)) is not first
    assert len(made._indices) == 2


def test_indices_of_large_tables_are_forgotten_sooner() -> None:
    shapes = [(diagonal(1000), partition(8, 4)), *[(None, diagonal(3))] * 12]
    made = FactorLayout(shapes, CPU)
    n_blocks = sum(made.n_blocks.values())
    table_and_norms = [(0, one, other) for one, other in combinations(range(1, 13), 2)]
    for layers in table_and_norms:
        assert made.index(layers) is made.index(layers)
        assert sum(sum(index.lengths) for index in made._indices.values()) <= layout.MOST_PASSES * n_blocks
    assert len(made._indices) == layout.MOST_PASSES
    norms = [(layer,) for layer in range(1, 13)]
    found = [made.index(layers) for layers in norms]
    assert [made.index(layers) for layers in norms] == found


def test_an_index_makes_no_python_number_for_each_row_of_a_table() -> None:
    shapes = [(diagonal(100_000), partition(8, 4)), *[(None, diagonal(3))] * 3]
    FactorLayout(SHAPES, CPU).index((0, 2))  # what is allocated once
    tracemalloc.start()
    try:
        FactorLayout(shapes, CPU).index((0, 2))
        assert tracemalloc.get_traced_memory()[1] < 100_000  # of Python's, not of torch's
    finally:
        tracemalloc.stop()
