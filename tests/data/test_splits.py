"""Groups are the connected components of shared keys, and no split shares one with another."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grasp_lora.data.encode import Example, Tally
from grasp_lora.data.groups import join_groups
from grasp_lora.data.splits import SPLITS, DataReport, Splits, assign, check_disjoint
from grasp_lora.errors import DataError


def example(identity: str, group: str = "", prompt: str = "") -> Example:
    return Example(identity, prompt or identity, "c", ("c",), "ar", group or identity, (1,), (2,))


def splits_of(**named: list[Example]) -> Splits:
    report = DataReport("completion", 0, 512, False, "{prompt}", 0, Tally("ar"), None, {})
    return Splits(**{name: tuple(named.get(name, ())) for name in SPLITS}, report=report)


class TestGroups:
    def test_chains_are_joined(self):
        keys = [{"id:1", "text:a"}, {"text:a", "article:x"}, {"article:x", "text:b"}, {"id:2", "text:c"}]
        groups = join_groups(map(frozenset, keys))
        assert [groups[min(k)] for k in keys] == ["a", "a", "a", "c"]

    @given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12), st.integers(0, 8)), max_size=40), st.randoms())
    def test_equals_a_closure_and_ignores_the_order(self, links, generator):
        keys = [frozenset({f"id:{i}", f"text:{t}", f"article:{a}"}) for i, t, a in links]
        groups = join_groups(keys)
        for start in keys:
            reached = set(start)
            while more := {key for other in keys if other & reached for key in other} - reached:
                reached |= more
            assert {groups[key] for key in reached} == {min(k[5:] for k in reached if k.startswith("text:"))}
        generator.shuffle(keys)
        assert join_groups(keys) == groups


class TestAssign:
    @staticmethod
    def groups(sizes: list[int]) -> list[list[Example]]:
        return [[example(f"{g}-{i}", str(g)) for i in range(size)] for g, size in enumerate(sizes)]

    def test_a_group_is_cut_only_where_none_fits(self):
        result = assign(self.groups([3, 2, 4, 1]), {"test": 5, "dev": 2, "train": None})
        assert [e.id for e in result["test"]] == ["0-0", "0-1", "0-2", "1-0", "1-1"]
        assert [e.id for e in result["dev"]] == ["3-0", "2-0"]
        assert result["train"] == []

    def test_spread_takes_little_of_each_group(self):
        result = assign(self.groups([20] * 20), {"test": 20, "micro_dev": 16, "train": 9}, ("micro_dev", "train"))
        groups = {name: Counter(e.group for e in examples) for name, examples in result.items()}
        assert groups["test"] == {"0": 20}
        assert set(groups["micro_dev"].values()) == {2}
        assert max(groups["train"].values()) == 2
        assert sum(groups["train"].values()) == 9

    @given(
        st.lists(st.integers(1, 9), max_size=30),
        st.lists(st.one_of(st.none(), st.integers(0, 20)), min_size=4, max_size=4),
        st.lists(st.sampled_from(["test", "micro_dev", "train"])),
    )
    def test_exact_and_disjoint(self, sizes, asked, spread):
        groups = self.groups(sizes)
        counts = dict(zip(("test", "dev", "micro_dev", "train"), asked, strict=True))
        result = assign(groups, counts, spread)
        taken = [{e.group for e in examples} for examples in result.values()]
        assert sum(map(len, taken)) == len(set().union(*taken))
        for name, count in counts.items():
            chosen = result[name]
            assert len({e.id for e in chosen}) == len(chosen)
            assert count is None or len(chosen) <= count
            if count is not None and len(chosen) < count:  # short only when nothing is left
                assert len(set().union(*taken)) == len(groups)


class TestCheckDisjoint:
    def test_clean_splits_pass(self):
        named = {name: [example(f"{name}{i}") for i in range(3)] for name in SPLITS}
        named["source_train"].append(example("translation", group="train0"))
        check_disjoint(splits_of(**named))

    @pytest.mark.parametrize("kind", ["id", "prompt", "group"])
    @pytest.mark.parametrize(
        "pair",
        [
            ("train", "test"),
            ("train", "dev"),
            ("micro_dev", "dev"),
            ("micro_dev", "test"),
            ("source_train", "test"),
            ("source_train", "micro_dev"),
            ("source_dev", "dev"),
            ("source_train", "source_dev"),
        ],
    )
    def test_planted_leaks(self, pair, kind):
        named = {name: [example(f"{name}{i}") for i in range(3)] for name in SPLITS}
        victim = named[pair[1]][0]
        planted = example("new") if kind != "id" else example(victim.id, group="new", prompt="new")
        if kind == "prompt":
            planted = example("new", prompt=f"  {victim.prompt}\n")
        elif kind == "group":
            planted = example("new", group=victim.group)
        named[pair[0]].append(planted)
        shared = {"id": 0, "prompt": 0, "group": 0, kind: 1}
        message = f"share {shared['id']} ids, {shared['prompt']} prompts and {shared['group']} groups"
        with pytest.raises(DataError, match=message) as caught:
            check_disjoint(splits_of(**named))
        assert any(f"{a} and {b} share" in str(caught.value) for a, b in (pair, pair[::-1]))

    def test_an_id_twice_in_one_split(self):
        with pytest.raises(DataError, match="dev holds 1 ids twice"):
            check_disjoint(splits_of(dev=[example("a"), example("a", group="b", prompt="c")]))
