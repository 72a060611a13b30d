"""Rows are padded to a few sizes; nothing about the padding is visible."""

from chatserve.model.attention import padded_rows


def test_there_are_few_sizes_and_they_are_close() -> None:
    sizes = [padded_rows(rows) for rows in range(1, 2049)]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) < 64
    for rows, size in enumerate(sizes, 1):
        assert size >= rows
        assert padded_rows(size) == size
        if rows > 32:
            assert size <= 1.125 * rows
        if rows <= 2:
            assert size == rows
