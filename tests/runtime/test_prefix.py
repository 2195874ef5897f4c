import pytest

from transmla_ext.runtime.prefix import SharedBlockPool, extend_keys

KEYS = [bytes([i]) for i in range(8)]


def published(num_blocks, keys):
    """A pool, and blocks of it that are found by these keys and owned once."""
    pool = SharedBlockPool(num_blocks)
    blocks = pool.allocate(len(keys))
    for block, key in zip(blocks, keys, strict=True):
        pool.publish(block, key)
    return pool, blocks


def test_a_page_is_free_when_its_last_owner_has_gone():
    pool, blocks = published(3, KEYS[:2])
    assert pool.find(KEYS[:2]) == blocks
    assert [pool.num_owners(block) for block in blocks] == [2, 2]
    pool.free(blocks)
    assert pool.num_free == 1
    pool.free(blocks)
    assert (pool.num_free, pool.num_blocks) == (3, 3)


def test_the_longest_known_run_is_found():
    pool, blocks = published(8, [KEYS[0], KEYS[1], KEYS[3]])
    assert pool.find(KEYS) == blocks[:2]
    assert pool.find(KEYS[2:]) == []
    assert [pool.num_owners(block) for block in blocks] == [2, 2, 1]


def test_given_back_pages_are_found_until_the_room_is_needed():
    pool, [first] = published(6, KEYS[:1])
    later = pool.allocate(3)
    for block, key in zip(later, KEYS[1:4], strict=True):
        pool.publish(block, key)
    pool.free(later)
    pool.free([first])
    pool.free(pool.find(KEYS[1:2]))  # used again: now the last to go
    pool.allocate(2)
    assert (pool.find(KEYS[3:4]), pool.num_free) == (later[2:], 3)
    pool.free(later[2:])
    assert pool.allocate(1) == [later[1]]  # of a sequence, the end goes first, but it was looked for since
    assert pool.allocate(1) == [first]
    assert (pool.find(KEYS[2:3]), pool.find(KEYS[:1])) == ([], [])
    assert pool.find(KEYS[1:2]) == [later[0]]


def test_allocation_is_all_or_nothing_and_forgets_nothing_in_vain():
    pool, blocks = published(3, KEYS[:2])
    pool.free(blocks)
    with pytest.raises(RuntimeError, match="4 wanted, 3 of 3 free"):
        pool.allocate(4)
    assert pool.find(KEYS[:2]) == blocks


def test_the_first_page_of_a_key_stays_the_one_found():
    pool, blocks = published(3, [KEYS[0], KEYS[0]])
    assert pool.find(KEYS[:1]) == blocks[:1]
    pool.forget(blocks[1])
    assert pool.find(KEYS[:1]) == blocks[:1]
    pool.forget(blocks[0])
    assert pool.find(KEYS[:1]) == []
    pool.publish(blocks[1], KEYS[0])
    assert pool.find(KEYS[:1]) == blocks[1:]


@pytest.mark.parametrize("wrong", [[2], [3], [-1], [0, 0], [0, 2]])
def test_more_owners_than_there_are_cannot_go(wrong):
    pool, _ = published(3, KEYS[:2])
    with pytest.raises(ValueError, match="fewer owners"):
        pool.free(wrong)
    assert (pool.num_free, pool.num_owners(0)) == (1, 1)


def test_keys_tell_what_comes_before():
    def keys(tokens):
        result = []
        extend_keys(result, tokens, 2)
        return result

    assert len(keys([1, 2, 3, 4, 5])) == 2
    assert keys([1, 2, 3, 4, 5]) == keys([1, 2, 3, 4])
    assert keys([1, 2, 3, 4])[0] == keys([1, 2])[0]
    assert keys([1, 2, 3, 4])[1] != keys([5, 2, 3, 4])[1]
    grown = keys([1, 2])
    extend_keys(grown, [1, 2, 3, 4], 2)
    assert grown == keys([1, 2, 3, 4])
