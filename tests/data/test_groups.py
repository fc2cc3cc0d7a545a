"""Rows of one conversation stay in one split."""

from grasp_lora.data.files import Row, Table
from grasp_lora.data.groups import MOST_CONTINUED, join_groups, keys_with_turns
from grasp_lora.data.records import Record, make_pool


def talk(*said: str) -> dict[str, object]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[place % 2], "content": text} for place, text in enumerate(said)]}


def groups(*pools: list[dict[str, object]]) -> list[str]:
    """The group of each row, where each list is a file of its own."""
    records: list[Record] = []
    for number, rows in enumerate(pools):
        table = Table(f"file {number}", [Row(f"row {place}", row) for place, row in enumerate(rows)])
        records += make_pool([table], "completion").records
    names = join_groups(keys_with_turns(records))
    return [names[min(record.keys)] for record in records]


def test_a_row_and_what_goes_on_after_it_join_also_across_files():
    first, second, third = groups(
        [talk("hi", "hello", "a", "b")], [talk("hi", "hello", "a ", "b", "c", "d"), talk("hi", "hello", "e", "f")]
    )
    assert first == second != third  # the opening that all share joins none


def test_rows_of_prompt_and_history_join():
    plain = {"instruction": "a", "output": "b"}
    first, second = groups([plain, {"instruction": "c", "output": "d", "history": [["a", "b"]]}])
    assert first == second


def test_an_opening_of_many_conversations_is_no_conversation():
    def found(count: int) -> set[str]:
        return set(groups([talk("hi", "hello"), *(talk("hi", "hello", f"q{i}", "a") for i in range(count))]))

    assert len(found(MOST_CONTINUED)) == 1
    assert len(found(MOST_CONTINUED + 1)) == MOST_CONTINUED + 2


def test_plain_rows_are_grouped_by_their_keys_alone():
    first, second = groups([{"prompt": "a", "completion": "b"}, {"prompt": "a\nb", "completion": "c"}])
    assert first != second
