import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from glm5_jax.inference.pages import PagePool, page_names

SIZE = 4


def tokens_of(text):
    return [ord(character) for character in text]


def test_names_tell_texts_apart_by_all_that_comes_before():
    first = list(page_names(tokens_of("abcdefghij"), SIZE))
    assert len(first) == 2
    assert list(page_names(tokens_of("abcdefghijkl"), SIZE))[:2] == first
    assert list(page_names(tokens_of("xbcdefgh"), SIZE))[1] != first[1]
    assert (
        list(page_names(tokens_of("abcdefghijkl"), SIZE, 2, first[1]))
        == list(page_names(tokens_of("abcdefghijkl"), SIZE))[2:]
    )


def test_what_was_used_last_is_kept_longest():
    pool = PagePool(3)
    names = list(page_names(list(range(12)), SIZE))
    pages = pool.take(3)
    for page, name in zip(pages, names, strict=True):
        pool.name(page, name)
    pool.release(pages)
    assert (pool.num_available, pool.num_kept) == (3, 3)
    pool.take(1)  # the end of the text goes first: without its beginning it cannot be found
    assert pool.count_known(names) == 2
    assert pool.find(names) == pages[:2]
    assert (pool.num_available, pool.num_kept) == (0, 0)


@given(data=st.data())
def test_no_page_is_lost_and_none_is_written_by_two(data):
    """Texts over two letters come and go, and share their beginnings."""
    pool, held = PagePool(12), []
    content = {}  # page -> the text up to its end, as whoever wrote it knows
    for _ in range(data.draw(st.integers(1, 40))):
        if held and data.draw(st.booleans()):
            pages, _ = held.pop(data.draw(st.integers(0, len(held) - 1)))
            pool.release(pages)
            continue
        text = data.draw(st.text("ab", min_size=1, max_size=16))
        names = list(page_names(tokens_of(text), SIZE))
        needed = -(-len(text) // SIZE)
        if pool.num_available < needed:
            continue
        known = pool.count_known(names)
        found = pool.find(names)
        assert len(found) == known
        for number, page in enumerate(found):
            assert content[page] == text[: (number + 1) * SIZE]
        new = pool.take(needed - len(found))
        assert not {page for pages, _ in held for page in pages} & set(new)
        for number, page in enumerate(new, start=len(found)):
            content[page] = text[: (number + 1) * SIZE]
            if number < len(names):
                pool.name(page, names[number])
        held.append((found + new, text))
        distinct = {page for pages, _ in held for page in pages}
        assert pool.num_available == 12 - len(distinct)
    for pages, _ in held:
        pool.release(pages)
    assert pool.num_available == 12
    assert sorted(pool.take(12)) == list(np.arange(12))
