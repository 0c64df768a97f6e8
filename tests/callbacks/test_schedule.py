import pytest

from advdmd_lightning.callbacks.schedule import at_least, is_due


def test_is_due_counts_from_the_start():
    assert [update for update in range(9) if is_due(update, every=3)] == [0, 3, 6]
    assert [update for update in range(9) if is_due(update, every=3, start=4)] == [4, 7]
    assert [update for update in range(4) if is_due(update, every=1, start=1)] == [1, 2, 3]


def test_at_least():
    assert at_least(1, 1, "every of X") == 1
    with pytest.raises(ValueError, match=r"init_args.every of X is 0: set 1 or more"):
        at_least(1, 0, "every of X")
