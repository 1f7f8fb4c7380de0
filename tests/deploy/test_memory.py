import pytest

from deploy.memory import ModelMemory
from tests.support.endpoint import Names


def test_the_newest_wish_is_recalled_in_whichever_order_replicas_write():
    store = Names()
    one, other = ModelMemory(store, "meanflow", "first"), ModelMemory(store, "meanflow", "first")
    assert one.recall() is None
    one.remember("models:/meanflow/10", 1_700_000_010.5)
    other.remember("models:/meanflow/9", 1_700_000_009.25)
    assert one.recall() == other.recall() == "models:/meanflow/10"
    other.remember('s3://bucket/a: "b"', 1_700_000_011.0)
    assert one.recall() == 's3://bucket/a: "b"'
    one.remember("models:/meanflow/10", 1_700_000_012.0)  # taken back
    assert other.recall() == "models:/meanflow/10"


def test_what_is_known_to_be_old_counts_where_nothing_else_is_known():
    memory = ModelMemory(Names(), "meanflow", "first")
    memory.remember("old", 0.0)
    assert memory.recall() == "old"
    memory.remember("new", 1.0)
    memory.remember("old", 0.0)
    assert memory.recall() == "new"


def test_one_entry_stays_and_those_of_others_are_left_alone():
    store = Names()
    memories = [
        ModelMemory(store, *key) for key in (("meanflow", "first"), ("meanflow", "first:2"), ("meanflow-2", "first"))
    ]
    for index, memory in enumerate(memories):
        for asked_at in (1.0, 3.0, 2.0):
            memory.remember(f"{index} at {asked_at}", asked_at)
    assert [memory.recall() for memory in memories] == ["0 at 3.0", "1 at 3.0", "2 at 3.0"]
    assert len(store.names) == 3


def test_of_two_wishes_of_one_second_the_later_counts():
    memory = ModelMemory(Names(), "meanflow", "first")
    memory.remember("b", 1.25)
    memory.remember("a", 1.4)
    assert memory.recall() == "a"


def test_of_entries_that_a_writer_left_behind_the_newest_counts():
    class Breaking(Names):
        is_away = False

        def remove(self, name):
            if self.is_away:
                raise OSError("the store is away")
            super().remove(name)

    store = Breaking()
    memory = ModelMemory(store, "meanflow", "first")
    memory.remember("older", 1.0)
    store.is_away = True
    with pytest.raises(OSError, match="away"):
        memory.remember("newer", 2.0)
    assert memory.recall() == "newer"
    store.is_away = False
    memory.remember("older", 0.0)
    assert memory.recall() == "newer"
    assert len(store.names) == 1
