"""A landscape file: what was recorded comes back exactly, what lies between is interpolated, and a damaged file is refused."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import landscape as landscape_module
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from landscape import SPLITS, Cost, FinalRun, Landscape, Trajectory
from smoothing import smooth

from grasp_lora.errors import GraspError

FACTS = {"name": "رسم", "probe_every": 10, "trained_examples": 80, "made_with": {"python": ["3.11"]}}


def loss(train_ratio: float | None, step: int, ratio: float, example: int) -> float:
    """Linear in each of its three numbers, so that interpolation has to be exact."""
    return 1.0 + 0.5 * (-0.2 if train_ratio is None else train_ratio) + 0.01 * step - 0.25 * ratio + example


def trajectory(train_ratio: float | None, steps: tuple[int, ...] = (0, 10, 30), examples: int = 2) -> Trajectory:
    ratios = (0.0, 0.2, 0.8)
    losses = [[[loss(train_ratio, s, r, e) for e in range(examples)] for r in ratios] for s in steps]
    return Trajectory(train_ratio, steps, ratios, np.array(losses))


def final(ratio: float, dev: float = 1.0) -> FinalRun:
    losses = {"micro_dev": (dev, dev + 1), "dev": (dev, dev, dev + 3), "test": (dev / 3,)}
    return FinalRun(ratio, 20, 10, losses, trained_examples=100 + round(100 * ratio), measured_examples=40)


@pytest.fixture
def recorded() -> Landscape:
    trajectories = tuple(trajectory(ratio) for ratio in (0.7, None, 0.0, 0.4))
    return Landscape(FACTS, trajectories, tuple(final(ratio, 1 + ratio) for ratio in (0.8, 0.0, 0.2, 0.4)))


def test_trajectories_on_dev_stand_apart(recorded: Landscape, tmp_path: Path) -> None:
    dev = replace(trajectory(None, examples=3), split="dev")
    both = replace(recorded, trajectories=(dev, *recorded.trajectories))
    both.save(tmp_path / "l")
    loaded = Landscape.load(tmp_path / "l")
    for one in (both, loaded):
        assert one.shared_dev is not None
        assert one.shared_dev.losses.shape[2] == 3
        assert one.shared is not None
        assert one.shared.losses.shape[2] == one.micro_dev_examples == 2
        assert [held.train_ratio for held in one.committed] == [0.0, 0.4, 0.7]
    assert recorded.shared_dev is None
    with pytest.raises(GraspError, match="dev has"):
        replace(recorded, trajectories=(replace(dev, losses=dev.losses[:, :, :2]), *recorded.trajectories))
    with pytest.raises(GraspError, match="is of the split 'test'; allowed: micro_dev, dev"):
        replace(dev, split="test")


class TestFile:
    def test_comes_back_as_it_was_to_the_last_bit_of_float32(self, tmp_path: Path) -> None:
        random = np.random.default_rng(0)
        noisy = Trajectory(0.1, (0, 3), (0.1 + 0.2, 1.0), random.normal(size=(2, 2, 5)) / 3)
        one = FinalRun(1 / 3, 20, 10, {split: tuple(random.normal(size=5).tolist()) for split in SPLITS}, 7, 10**12)
        before = Landscape(FACTS, (replace(noisy, train_ratio=None), noisy), (one, replace(one, ratio=0.5)))
        before.save(tmp_path / "l.parquet")
        after = Landscape.load(tmp_path / "l.parquet")

        assert after.facts == FACTS
        assert [one.train_ratio for one in after.trajectories] == [None, 0.1]
        for old, new in zip(before.trajectories, after.trajectories, strict=True):
            assert (new.steps, new.ratios) == (old.steps, old.ratios)
            assert new.losses.dtype == np.float64
            assert (new.losses == old.losses.astype(np.float32)).all()
        for old, new in zip(before.finals, after.finals, strict=True):
            rounded = {split: tuple(map(float, np.float32(losses))) for split, losses in old.losses.items()}
            assert new == replace(old, losses=rounded)

    def test_the_same_content_gives_the_same_bytes_in_whatever_order_it_came(
        self, recorded: Landscape, tmp_path: Path
    ) -> None:
        recorded.save(tmp_path / "first")
        turned = Landscape(
            dict(reversed(FACTS.items())), tuple(reversed(recorded.trajectories)), tuple(reversed(recorded.finals))
        )
        turned.save(tmp_path / "second")
        Landscape.load(tmp_path / "first").save(tmp_path / "third")
        contents = {(tmp_path / name).read_bytes() for name in ("first", "second", "third")}
        assert len(contents) == 1

    def test_a_setting_of_the_usual_size_takes_few_bytes(self, tmp_path: Path) -> None:
        random = np.random.default_rng(0)
        steps, ratios = tuple(range(9)), tuple(number / 10 for number in range(9))
        trajectories = [Trajectory(one, steps, ratios, random.normal(size=(9, 9, 16))) for one in (None, 0.0, 0.4, 0.7)]
        losses = {split: tuple(random.normal(size=50).tolist()) for split in ("dev", "test")}
        finals = [FinalRun(ratio, 9, 9, losses | {"micro_dev": (1.0,) * 16}, 1, 1) for ratio in ratios]
        Landscape(FACTS, tuple(trajectories), tuple(finals)).save(tmp_path / "l")
        numbers = 4 * 9 * 9 * 16 + 9 * 100  # of 4 bytes that nothing can compress
        assert (tmp_path / "l").stat().st_size < 4 * numbers * 1.2 + 5000

    def test_facts_that_are_no_json_are_refused(self, recorded: Landscape, tmp_path: Path) -> None:
        for fact in ({1, 2}, float("nan")):
            with pytest.raises(GraspError, match="plain JSON"):
                replace(recorded, facts={"fact": fact}).save(tmp_path / "l")
        assert not list(tmp_path.iterdir())


def without_train_ratio(table: pa.Table) -> pa.Table:
    return table.filter(pc.invert(pc.and_(pc.equal(table["part"], "trajectory"), pc.is_valid(table["train_ratio"]))))


def with_value(name: str, value: object, row: int = 0) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        values = table[name].to_pylist()
        values[row] = value
        field = table.schema.field(name)
        return table.set_column(table.column_names.index(name), field, pa.array(values, field.type))

    return change


DAMAGES: dict[str, tuple[Callable[[pa.Table], pa.Table], str]] = {
    "a column less": (lambda table: table.drop_columns(["split"]), "other columns"),
    "a column of another type": (lambda table: table.cast(table.schema.set(6, pa.field("loss", pa.float64()))), "columns"),
    "no rows": (lambda table: table.slice(0, 0), "rows"),
    "a row less": (lambda table: table.slice(1), "missing"),
    "the last row less": (lambda table: table.slice(0, len(table) - 1), "has losses of micro_dev, dev"),
    "a row twice": (lambda table: pa.concat_tables([table, table.slice(3, 1)]), "1 rows say a second time"),
    "no committed ratio": (without_train_ratio, "no trajectory of a committed ratio"),
    "no final run": (lambda table: table.filter(pc.equal(table["part"], "trajectory")), "final runs are at ratios"),
    "no facts": (lambda table: table.replace_schema_metadata(None), "facts"),
    "a later version": (
        lambda table: table.replace_schema_metadata({"grasp_lora.landscape": '{"version": 2, "facts": {}}'}), "version 2",
    ),
    "facts that are a list": (lambda table: table.replace_schema_metadata({"grasp_lora.landscape": "[]"}), "facts"),
    "a loss that is NaN": (with_value("loss", float("nan")), "1 losses are no finite numbers"),
    "a final loss that is infinite": (with_value("loss", float("inf"), -1), "1 losses are no finite numbers"),
    "a ratio above 1": (with_value("train_ratio", 1.5, 20), "ratio"),
    "a ratio that is NaN": (with_value("ratio", float("nan"), 3), "rows of the training at ratio None are missing"),
    "an unknown part": (with_value("part", "\x1b[31m"), r"a part is '\\x1b\[31m'"),
    "an unknown split": (with_value("split", "train", -1), "has losses of"),
    "an example of the end number": (with_value("example", 9, -1), "lacks examples"),
    "a final run of two costs": (with_value("trained_examples", 5, -1), "no single number"),
    "a final run without cost": (with_value("measured_examples", None, -1), "no single number"),
}  # fmt: skip


class TestDamage:
    @pytest.mark.parametrize("damage", DAMAGES)
    def test_a_damaged_table_is_refused_in_one_line(self, damage: str, recorded: Landscape, tmp_path: Path) -> None:
        file = tmp_path / "l.parquet"
        recorded.save(file)
        change, message = DAMAGES[damage]
        pq.write_table(change(pq.read_table(file)), file)
        with pytest.raises(GraspError, match=message) as caught:
            Landscape.load(file)
        assert str(file) in str(caught.value)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("content", [None, b"", b"PAR1", b"{}", b"PAR1" + bytes(100) + b"PAR1"])
    def test_a_file_that_is_no_parquet_is_refused(self, content: bytes | None, tmp_path: Path) -> None:
        if content is not None:
            (tmp_path / "l").write_bytes(content)
        with pytest.raises(GraspError, match="cannot be read as a landscape"):
            Landscape.load(tmp_path / "l")

    def test_spoiled_bytes_are_refused_or_read_but_never_crash(self, recorded: Landscape, tmp_path: Path) -> None:
        file = tmp_path / "l"
        recorded.save(file)
        whole = file.read_bytes()
        random = np.random.default_rng(0)
        refused = 0
        for _ in range(60):
            spoiled = bytearray(whole)
            for place in random.integers(len(whole), size=3):
                spoiled[place] = random.integers(256)
            file.write_bytes(spoiled[: random.integers(len(whole))] if random.random() < 0.2 else spoiled)
            try:
                Landscape.load(file)
            except GraspError:
                refused += 1
        assert refused > 10

    def test_a_file_that_claims_too_many_rows_is_refused(
        self, recorded: Landscape, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        recorded.save(tmp_path / "l")
        monkeypatch.setattr(landscape_module, "MOST_ROWS", 50)
        with pytest.raises(GraspError, match="between 1 and 50 rows"):
            Landscape.load(tmp_path / "l")


class TestParts:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"steps": (0, 10, 10)}, "must increase"),
            ({"steps": (-1, 10, 20)}, "must increase"),
            ({"ratios": (0.0, 0.8, 0.2)}, "must increase"),
            ({"ratios": (0.0, 0.2, 80.0)}, "fraction"),
            ({"train_ratio": float("nan")}, "fraction"),
            ({"steps": (0, 10)}, r"shape \(3, 3, 2\) for 2 steps"),
            ({"losses": np.zeros((3, 3, 0))}, "shape"),
            ({"losses": np.full((3, 3, 2), 1e39)}, "18 losses"),
        ],
    )
    def test_a_trajectory_that_does_not_fit_together(self, change: dict, message: str) -> None:
        with pytest.raises(GraspError, match=message):
            replace(trajectory(0.4), **change)

    def test_the_parts_must_belong_together(self, recorded: Landscape) -> None:
        with pytest.raises(GraspError, match="micro_dev has"):
            replace(recorded, trajectories=(trajectory(0.0, examples=3),))
        with pytest.raises(GraspError, match="two trajectories of one ratio"):
            replace(recorded, trajectories=(trajectory(0.0), trajectory(0.0)))
        with pytest.raises(GraspError, match="each ratio once"):
            replace(recorded, finals=(final(0.1), final(0.1)))
        longer = replace(final(0.1), losses=final(0.1).losses | {"dev": (1.0,)})
        with pytest.raises(GraspError, match=r"dev has \[1, 3\] examples"):
            replace(recorded, finals=(longer, final(0.2)))
        with pytest.raises(GraspError, match="no trajectory of a committed ratio"):
            replace(recorded, trajectories=(trajectory(None),))


class TestInterpolation:
    def test_recorded_points_come_back_as_they_are(self, recorded: Landscape) -> None:
        for train_ratio, step, ratio in itertools.product((None, 0.0, 0.4, 0.7), (0, 10, 30), (0.0, 0.2, 0.8)):
            expected = [loss(train_ratio, step, ratio, example) for example in range(2)]
            assert recorded.probe(train_ratio, step, ratio).tolist() == expected

    def test_between_them_it_is_linear_in_each_direction(self, recorded: Landscape) -> None:
        for train_ratio, step, ratio in [
            (0.4, 15, 0.2),
            (0.0, 10, 0.35),
            (0.1, 0, 0.8),
            (0.55, 27, 0.61),
            (None, 7, 0.1),
        ]:
            expected = [loss(train_ratio, step, ratio, example) for example in range(2)]
            assert recorded.probe(train_ratio, step, ratio) == pytest.approx(expected)

    def test_a_corner_by_hand(self) -> None:
        low = Trajectory(0.0, (0, 10), (0.0, 0.4), np.array([[[1.0], [2.0]], [[3.0], [8.0]]]))
        high = Trajectory(0.5, (0, 10), (0.0, 0.4), np.array([[[0.0], [0.0]], [[0.0], [16.0]]]))
        finals = (replace(final(0.0), losses=dict.fromkeys(SPLITS, (1.0,))),)
        one = Landscape(FACTS, (low, high), (*finals, replace(finals[0], ratio=0.8)))
        # At a quarter of the ratios: 1.25 before, 4.25 after; halfway 2.75. The other one: 0 and 4; halfway 2.
        assert one.probe(0.0, 5, 0.1) == pytest.approx([2.75])
        assert one.probe(0.5, 5, 0.1) == pytest.approx([2.0])
        assert one.probe(0.2, 5, 0.1) == pytest.approx([0.6 * 2.75 + 0.4 * 2.0])

    def test_beyond_them_it_is_constant(self, recorded: Landscape) -> None:
        assert (recorded.probe(0.9, 99, 0.95) == recorded.probe(0.7, 30, 0.8)).all()
        assert recorded.final_loss(1.0, "test") == recorded.final_loss(0.8, "test")

    def test_final_losses(self, recorded: Landscape) -> None:
        assert recorded.final_loss(0.2, "dev") == pytest.approx(2.2)
        assert recorded.final_loss(0.6, "dev") == pytest.approx(2.6)
        assert recorded.final_losses(0.5, "micro_dev") == pytest.approx([1.5, 2.5])
        assert recorded.final_loss(0.1, "test") == pytest.approx(1.1 / 3)

    def test_a_missing_shared_trajectory_is_an_error_only_where_it_is_asked_for(self, recorded: Landscape) -> None:
        alone = replace(recorded, trajectories=(trajectory(0.4),))
        assert (alone.probe(0.0, 10, 0.2) == alone.probe(0.7, 10, 0.2)).all()
        with pytest.raises(GraspError, match="no shared trajectory"):
            alone.probe(None, 10, 0.2)


class TestCost:
    def test_of_the_runs(self, recorded: Landscape) -> None:
        assert recorded.controller_cost(probes=12) == Cost(80, 24)
        assert recorded.final_cost(0.3) == Cost(pytest.approx(130), pytest.approx(40))
        assert (Cost(80, 24) + Cost(100, 40)).work == 2 * 180 + 64

    @pytest.mark.parametrize("fact", [None, 0, "80"])
    def test_of_a_controller_run_that_the_facts_do_not_tell(self, recorded: Landscape, fact: object) -> None:
        with pytest.raises(GraspError, match="trained_examples"):
            replace(recorded, facts={"trained_examples": fact}).controller_cost(0)


class TestSmoothing:
    def test_a_polynomial_is_found_again(self) -> None:
        ratios = [number / 10 for number in range(9)]
        fit = smooth(ratios, [0.7 + (ratio - 0.43) ** 2 for ratio in ratios], 0.1, 0.8)
        assert fit.ratio == pytest.approx(0.43, abs=1e-3)
        assert fit.loss == pytest.approx(0.7, abs=1e-6)
        assert fit(0.2) == pytest.approx(0.7 + 0.23**2)

    def test_the_luck_of_one_run_does_not_decide(self) -> None:
        ratios = [number / 20 for number in range(17)]
        losses = [1 + (ratio - 0.4) ** 2 for ratio in ratios]
        losses[14] -= 0.11  # the lowest one now, at 0.7
        assert min(ratios, key=lambda ratio: losses[ratios.index(ratio)]) == 0.7
        assert smooth(ratios, losses, 0.1, 0.8).ratio < 0.55

    def test_noise_alone_is_not_followed_as_closely_as_a_steep_rise(self) -> None:
        ratios = [number / 20 for number in range(17)]
        noise = np.random.default_rng(3).normal(0, 0.02, 17)
        assert smooth(ratios, 1 + (np.array(ratios) - 0.4) ** 2 + noise, 0.1, 0.8).degree == 2
        assert smooth(ratios, np.exp((np.array(ratios) - 0.8) / 0.1), 0.1, 0.8).degree == 5

    def test_it_finds_better_ratios_than_the_best_single_run(self) -> None:
        """Curves that fall gently and rise steeply, 16 runs with noise of 0.5 %: what the chosen ratio loses, in percent."""
        random = np.random.default_rng(0)
        ratios, grid = np.arange(1, 17) / 20, np.linspace(0.1, 0.8, 701)
        smoothed, single = [], []
        for _ in range(300):
            fall, rise, scale = random.uniform(0, 0.1), random.uniform(0.06, 0.3), random.uniform(0.06, 0.2)

            def truth(ratio: np.ndarray, fall: float = fall, rise: float = rise, scale: float = scale) -> np.ndarray:
                return 1 - fall * ratio + rise * np.exp((ratio - 0.8) / scale)

            losses = truth(ratios) + random.normal(0, 0.005, 16)
            chosen = np.array([smooth(ratios.tolist(), losses, 0.1, 0.8).ratio, ratios[1:][losses[1:].argmin()]])
            lost = 100 * (truth(chosen) / truth(grid).min() - 1)
            smoothed.append(lost[0])
            single.append(lost[1])
        assert np.mean(smoothed) < 0.12
        assert np.mean(smoothed) < 0.7 * np.mean(single)

    def test_the_minimum_is_sought_on_the_range_that_was_recorded(self) -> None:
        ratios = [0.2, 0.3, 0.4, 0.5, 0.6]
        assert smooth(ratios, ratios, 0.1, 0.8).ratio == pytest.approx(0.2)
        assert smooth(ratios, [-ratio for ratio in ratios], 0.1, 0.8).ratio == pytest.approx(0.6)
        assert smooth(ratios, ratios, 0.35, 0.8).ratio == pytest.approx(0.35)

    @pytest.mark.parametrize("ratios", [[0.1, 0.4, 0.8], [0.0, 0.02, 0.05, 0.08]])
    def test_too_few_ratios(self, ratios: list[float]) -> None:
        with pytest.raises(GraspError, match="at least four"):
            smooth(ratios, ratios, 0.1, 0.8)

    def test_of_final_losses(self, recorded: Landscape) -> None:
        fit = recorded.smooth_final("dev")
        assert fit.ratio == pytest.approx(0.1)
        assert fit(0.4) == pytest.approx(2.4)
