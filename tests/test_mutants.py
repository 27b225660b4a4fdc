import pytest

from tests.mutants import MUTANTS, ROOT


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_every_bug_can_be_put_in(mutant):
    """So that `make mutants` goes on to run; that a test then fails takes too long for this one."""
    assert (ROOT / mutant.file).read_text().count(mutant.text) == 1
    assert mutant.becomes != mutant.text
