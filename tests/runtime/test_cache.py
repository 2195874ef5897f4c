import pytest
import torch

from transmla_ext.runtime import CachedSequence, CacheFullError, PagedLatentCache


def make_cache(max_tokens=40, block_size=4):
    return PagedLatentCache(
        [3, 5], dtype=torch.float32, device=torch.device("cpu"), block_size=block_size, max_tokens=max_tokens
    )


def slots_by_table(cache, tables, row):
    """Slot of every token of a sequence, read off its block_table row."""
    positions = torch.arange(int(tables.cache_seqlens[row]))
    return tables.block_table[row][positions // cache.block_size] * cache.block_size + positions % cache.block_size


def test_the_tables_agree_through_growth_and_recycling():
    cache = make_cache()
    a, b, c = (CachedSequence() for _ in range(3))
    slots = {sequence.number: [] for sequence in (a, b, c)}
    for batch in ([(a, 3), (b, 6)], [(a, 1)], [(a, 1), (b, 1)], [(c, 9), (a, 1)], [(b, 5), (c, 1)], [(a, 4)]):
        sequences, num_new = zip(*batch, strict=True)
        before = [sequence.length for sequence in sequences]
        tables = cache.append(sequences, num_new)
        new = tables.slot_mapping.split(num_new)
        for row, (sequence, num) in enumerate(batch):
            slots[sequence.number] += new[row].tolist()
            assert sequence.length == before[row] + num
            assert slots_by_table(cache, tables, row).tolist() == slots[sequence.number]
        assert tables.positions.tolist() == [
            position for start, num in zip(before, num_new, strict=True) for position in range(start, start + num)
        ]
        used = [slot for of_one in slots.values() for slot in of_one]
        assert len(used) == len(set(used))
        if c.length == 10 and not b.freed:
            cache.free([b])
            del slots[b.number]
    assert cache.num_free_tokens == 40 - 12 - 12


def test_growing_keeps_what_is_cached():
    cache = make_cache()
    cache.append([first := CachedSequence()], [4])
    for layer in cache.layers:
        layer[first.blocks[0]] = torch.arange(layer.size(2))
    cache.append([CachedSequence()], [30])
    for layer in cache.layers:
        assert layer.size(0) <= 10
        assert torch.equal(layer[first.blocks[0]], torch.arange(layer.size(2)).float().expand(4, -1))


def test_a_full_cache_changes_nothing():
    cache = make_cache(max_tokens=12)
    cache.append([a := CachedSequence()], [7])
    b = CachedSequence()
    with pytest.raises(CacheFullError, match=r"2 more pages of 4 tokens wanted, 1 of 3 free.*larger max_tokens"):
        cache.append([a, b], [2, 1])
    assert (a.length, len(a.blocks), b.blocks, cache.num_free_tokens) == (7, 2, [], 4)
    cache.append([a, b], [1, 1])


def fill(cache, sequence, num_new, value):
    tables = cache.append([sequence], [num_new])
    for layer in cache.layers:
        layer.view(-1, layer.size(2))[tables.slot_mapping] = value
    return tables


def rows(cache, sequence):
    return cache.layers[1][sequence.blocks].flatten(0, 1)[: sequence.length, 0].tolist()


def test_a_shared_page_is_copied_before_it_is_written():
    cache = make_cache(max_tokens=16)
    fill(cache, a := CachedSequence(), 4, 1.0)
    fill(cache, a, 3, 2.0)
    for block, key in zip(a.blocks, (b"0", b"1"), strict=True):
        cache.pool.publish(block, key)
    b = CachedSequence(length=5, blocks=cache.pool.find([b"0", b"1"]))
    assert (cache.num_missing(b, 3), cache.num_missing(b, 4), cache.num_free_tokens) == (1, 2, 8)
    cache.append([b, CachedSequence()], [0, 1])  # its row of the block table is there before the copy
    tables = fill(cache, b, 2, 3.0)
    assert rows(cache, a) == [1.0] * 4 + [2.0] * 3
    assert rows(cache, b) == [1.0] * 4 + [2.0] + [3.0] * 2
    assert slots_by_table(cache, tables, 0)[-2:].tolist() == tables.slot_mapping.tolist()
    assert a.blocks[0] == b.blocks[0]
    assert cache.pool.find([b"0", b"1"]) == a.blocks


def test_a_page_to_be_written_is_no_longer_found():
    cache = make_cache()
    fill(cache, a := CachedSequence(), 6, 1.0)
    cache.pool.publish(a.blocks[1], b"key")
    before = list(a.blocks)
    fill(cache, a, 1, 2.0)
    assert (a.blocks, cache.pool.find([b"key"])) == (before, [])


def test_a_copy_that_does_not_fit_changes_nothing():
    cache = make_cache(max_tokens=8)
    fill(cache, a := CachedSequence(), 8, 1.0)
    cache.pool.publish(a.blocks[1], b"key")
    b = CachedSequence(length=2, blocks=cache.pool.find([b"key"]))
    with pytest.raises(CacheFullError, match="1 more pages"):
        cache.append([b], [1])
    assert (b.length, b.blocks, rows(cache, a)) == (2, a.blocks[1:], [1.0] * 8)
    cache.free([a])
    fill(cache, b, 1, 2.0)


def test_misuse_is_refused():
    cache = make_cache()
    cache.append([a := CachedSequence()], [5])
    with pytest.raises(ValueError, match="twice"):
        cache.append([a, a], [1, 1])
    cache.free([a])
    cache.free([a])
    assert cache.num_free_tokens == 40
    with pytest.raises(ValueError, match="after it was freed"):
        cache.append([a], [1])
    with pytest.raises(ValueError, match="max_tokens must be at least 1"):
        make_cache(max_tokens=0)
    with pytest.raises(ValueError, match="block_size must be at least 1"):
        make_cache(block_size=0)
