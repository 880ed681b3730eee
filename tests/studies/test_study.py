"""The frame: what is computed, what is kept, and what a partial rendering says."""

from __future__ import annotations

import importlib.util
import json
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from omega_qvla.evaluation.ray_cluster import RayCluster
from omega_qvla.evaluation.workers import Workers
from omega_qvla.studies.study import Cell, Options, Result, StudyError, run_study


@dataclass
class Numbers:
    """A study of given cells that writes their values."""

    given: list[Cell]
    name: str = "numbers"
    summary: str = "values"
    published: str = "nowhere"

    def cells(self, options: Options) -> list[Cell]:
        return self.given

    def render(self, results: Mapping[str, Result], out: Path) -> None:
        text = " ".join(f"{key}={result['value']}" for key, result in results.items())
        (out / "numbers.md").write_text(text)


class Counter:
    """Makes cells and counts their computations."""

    def __init__(self) -> None:
        self.computed: list[str] = []

    def cell(self, key: str, value: Any = 0, what: Mapping[str, Any] | None = None) -> Cell:
        def compute() -> Result:
            self.computed.append(key)
            if isinstance(value, BaseException):
                raise value
            return {"value": value}

        return Cell(key, what or {}, compute)


@pytest.fixture
def counter() -> Counter:
    return Counter()


@pytest.fixture
def options(tmp_path: Path) -> Options:
    return Options(tmp_path, {}, ())


def only(options: Options, pattern: str) -> Options:
    return Options(options.out, options.sources, options.tasks, only=pattern)


def rendered(options: Options) -> str:
    return (options.out / "numbers.md").read_text()


def test_finished_cells_are_not_computed_again(counter: Counter, options: Options) -> None:
    study = Numbers([counter.cell("a", 1), counter.cell("b", 2)])
    run_study(study, options)
    assert rendered(options) == "a=1 b=2"
    run_study(study, options)
    assert counter.computed == ["a", "b"]
    assert rendered(options) == "a=1 b=2"


def test_a_failed_cell_is_named_and_the_others_are_kept(
    counter: Counter, options: Options, capfd: pytest.CaptureFixture[str]
) -> None:
    study = Numbers([counter.cell("a", 1), counter.cell("b", ZeroDivisionError("none left")), counter.cell("c", 3)])
    with pytest.raises(StudyError, match=r"1 of 3 cells of numbers failed: b \(ZeroDivisionError: none left\)"):
        run_study(study, options)
    assert "b failed: ZeroDivisionError" in capfd.readouterr().err
    assert rendered(options).endswith("a=1 c=3") and "1 of 3 cells are missing** (b)" in rendered(options)
    error = options.out / "numbers" / "cells" / "b.error"
    assert "Traceback" in error.read_text()

    mended = Numbers([counter.cell("a", 1), counter.cell("b", 2), counter.cell("c", 3)])
    run_study(mended, options)
    assert counter.computed == ["a", "b", "c", "b"]
    assert rendered(options) == "a=1 b=2 c=3"
    assert not error.exists()


def test_an_interruption_keeps_what_is_finished(counter: Counter, options: Options) -> None:
    study = Numbers([counter.cell("a", 1), counter.cell("b", KeyboardInterrupt())])
    with pytest.raises(KeyboardInterrupt):
        run_study(study, options)
    run_study(Numbers([counter.cell("a", 1), counter.cell("b", 2)]), options)
    assert counter.computed == ["a", "b", "b"]


def test_a_changed_description_is_computed_again(
    counter: Counter, options: Options, capfd: pytest.CaptureFixture[str]
) -> None:
    run_study(Numbers([counter.cell("a", 1, {"bits": 4}), counter.cell("b", 1, {"bits": (4, 4)})]), options)
    capfd.readouterr()
    run_study(Numbers([counter.cell("a", 2, {"bits": 3}), counter.cell("b", 2, {"bits": (4, 4)})]), options)
    assert "a: kept result is of other inputs" in capfd.readouterr().err
    assert rendered(options) == "a=2 b=1"


def test_a_result_of_another_processor_is_computed_again(counter: Counter, options: Options) -> None:
    study = Numbers([counter.cell("a", 1)])
    run_study(study, options)
    file = options.out / "numbers" / "cells" / "a.json"
    document = json.loads(file.read_text())
    document["fingerprint"]["cpu"] = "another"
    file.write_text(json.dumps(document))
    run_study(study, options)
    assert counter.computed == ["a", "a"]


def test_a_selection_renders_what_is_finished_and_says_what_is_missing(counter: Counter, options: Options) -> None:
    study = Numbers([counter.cell("b-w4", 1), counter.cell("a-w4", 2), counter.cell("a-w8", 3)])
    run_study(study, only(options, "w8$"))
    assert counter.computed == ["a-w8"]
    assert "2 of 3 cells are missing** (b-w4, a-w4); `omega-qvla reproduce numbers`" in rendered(options)
    run_study(study, only(options, "^b"))
    document = json.loads((options.out / "numbers.json").read_text())
    assert list(document["cells"]) == ["b-w4", "a-w8"] and document["missing"] == ["a-w4"]
    run_study(study, options)
    assert rendered(options) == "b-w4=1 a-w4=2 a-w8=3"


def test_nothing_is_rendered_if_nothing_is_finished(counter: Counter, options: Options) -> None:
    with pytest.raises(StudyError):
        run_study(Numbers([counter.cell("a", RuntimeError("broken"))]), options)
    assert [path.name for path in options.out.iterdir()] == ["numbers"]


def test_a_result_that_is_no_json_fails_its_cell(counter: Counter, options: Options) -> None:
    study = Numbers([counter.cell("a", float("nan")), counter.cell("b", object()), counter.cell("c", 1)])
    with pytest.raises(StudyError, match=r"2 of 3 .*a \(ValueError: .*b \(TypeError: "):
        run_study(study, options)
    assert rendered(options).endswith("c=1")


def test_fresh_and_kept_results_are_rendered_alike(counter: Counter, options: Options) -> None:
    study = Numbers([counter.cell("a", (1, 2))])
    run_study(study, options)
    assert rendered(options) == "a=[1, 2]"


@pytest.mark.slow
def test_processes_and_a_cluster_give_the_same_as_this_one(tmp_path: Path) -> None:
    cells = [Cell(f"cell-{number}", {}, partial(dict, value=number)) for number in range(3)]
    broken: Callable[..., Any] = operator.truediv
    cells.insert(1, Cell("broken", {}, partial(broken, 1, 0)))
    texts = []
    elsewhere: list[Workers] = [RayCluster("local", at_a_time=2)] if importlib.util.find_spec("ray") else []
    for number, workers in enumerate((1, 2, *elsewhere)):
        options = Options(tmp_path / str(number), {}, ())
        with pytest.raises(StudyError, match=r"broken \(ZeroDivisionError: "):
            run_study(Numbers(cells), options, workers)
        texts.append(rendered(options))
        assert (options.out / "numbers" / "cells" / "broken.error").exists()
    assert len(set(texts)) == 1 and texts[0].endswith("cell-0=0 cell-1=1 cell-2=2")


@pytest.mark.parametrize("key", ["", "A", "a/b", ".a", "a b", "é"])
def test_keys_are_file_names(key: str, counter: Counter, options: Options) -> None:
    with pytest.raises(ValueError, match="is no file name"):
        run_study(Numbers([counter.cell(key)]), options)


def test_wrong_requests_are_refused(counter: Counter, options: Options) -> None:
    with pytest.raises(ValueError, match="two cells 'a'"):
        run_study(Numbers([counter.cell("a"), counter.cell("a")]), options)
    with pytest.raises(ValueError, match=r"only = 'z' matches no cell of study numbers; it has a, b"):
        run_study(Numbers([counter.cell("a"), counter.cell("b")]), only(options, "z"))
    with pytest.raises(ValueError, match=r"only = '\(' is no regular expression"):
        only(options, "(")
    assert not counter.computed


def test_a_foreign_file_is_an_error(counter: Counter, options: Options) -> None:
    study = Numbers([counter.cell("a", 1)])
    run_study(study, options)
    file = options.out / "numbers" / "cells" / "a.json"
    file.write_text(file.read_text()[:20])
    with pytest.raises(ValueError, match=r"a\.json is not the file of a cell; remove it"):
        run_study(study, options)
