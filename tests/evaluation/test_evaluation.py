"""The whole evaluation on fakes, its file and its report."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from line_world import TASKS, full_precision, full_precision_again, line_benchmark, quantized

from omega_qvla.evaluation import report, results
from omega_qvla.evaluation.results import Evaluation
from omega_qvla.evaluation.run import Candidate, evaluate_policies


def evaluate(*candidates: Candidate, **options: int) -> Evaluation:
    chosen = {"episodes_per_task": 6, "lanes": 4, "latency_repeats": 2} | options
    return evaluate_policies(candidates, line_benchmark(), **chosen)


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    checkpoint = tmp_path_factory.mktemp("checkpoint")
    (checkpoint / "weights").mkdir()
    (checkpoint / "weights" / "a.bin").write_bytes(b"x" * 700)
    (checkpoint / "config.json").write_bytes(b"y" * 50)
    return evaluate(Candidate(full_precision), Candidate(quantized, checkpoint))


def test_what_was_measured(evaluation: Evaluation) -> None:
    reference, policy = evaluation.policies
    assert len(reference.episodes) == len(policy.episodes) == 6 * len(TASKS)
    assert reference.fidelity is None and policy.fidelity is not None
    assert policy.fidelity.observations <= 128
    assert policy.latency is not None and policy.latency.repeats == 2
    assert (reference.bytes_on_disk, policy.bytes_on_disk) == (None, 750)
    paired = evaluation.paired(policy)
    assert paired.wins - paired.losses == policy.success().successes - reference.success().successes
    assert evaluation.fidelity_seeds == (600_000,)


def test_json_round_trip(evaluation: Evaluation, tmp_path: Path) -> None:
    results.save(evaluation, tmp_path / "deep" / "evaluation.json")
    assert results.load(tmp_path / "deep" / "evaluation.json") == evaluation
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["evaluation.json"]
    document = json.loads(results.to_json(evaluation))
    assert document["policies"][1]["derived"]["paired_with_reference"]["wins"] >= 0
    assert document["machine"]["packages"]["numpy"]


def test_foreign_files_are_refused(evaluation: Evaluation) -> None:
    document = json.loads(results.to_json(evaluation))
    for changed, message in (
        (document | {"schema_version": 99}, "schema version 99"),
        ([], "schema version None"),
        (document | {"surprise": 1}, "surprise"),
        ({name: value for name, value in document.items() if name != "seeds"}, "seeds"),
    ):
        with pytest.raises(ValueError, match=message):
            results.from_json(json.dumps(changed))


def test_nan_does_not_get_into_the_file(evaluation: Evaluation) -> None:
    fidelity = evaluation.policies[1].fidelity
    assert fidelity is not None
    spoiled = replace(evaluation.policies[1], fidelity=replace(fidelity, mse=float("nan")))
    with pytest.raises(ValueError, match="not JSON compliant"):
        results.to_json(replace(evaluation, policies=(evaluation.policies[0], spoiled)))


def test_page_needs_no_network(evaluation: Evaluation) -> None:
    page = report.html(evaluation)
    assert not re.search(r"https?:|//[a-z]|<script|<link|@import|url\((?!#)", page)
    for part in ("omega-qvla", "simulated", "95 % Wilson", "data:image/jpeg;base64,", "<svg", "numpy"):
        assert part in page
    assert page.count("<svg") == 4


def test_labels_are_escaped(evaluation: Evaluation) -> None:
    renamed = replace(evaluation.policies[1], label="<b>W4|A4</b>")
    changed = replace(evaluation, policies=(evaluation.policies[0], renamed), strips=())
    assert "<b>W4" not in report.html(changed)
    assert r"<b>W4\|A4</b>" in report.markdown(changed)


def test_markdown_and_terminal_tables(evaluation: Evaluation, tmp_path: Path) -> None:
    written, page = report.write_report(evaluation, tmp_path)
    text = written.read_text(encoding="utf-8")
    assert page.exists() and "imitates the integers" in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + 2 + 2 + len(TASKS)
    shown = report.table(evaluation)
    assert "full precision" in shown and "omega-qvla" in shown and "\x1b" not in shown


def test_measurements_can_be_left_out() -> None:
    bare = evaluate(Candidate(full_precision), fidelity_observations=0, latency_repeats=0)
    assert bare.policies[0].latency is None
    assert "<svg" in report.html(bare) and report.table(bare) and report.markdown(bare)
    assert results.from_json(results.to_json(bare)) == bare


def test_files_of_earlier_releases_are_read(evaluation: Evaluation) -> None:
    """The defaults of these fields are what files said that did not have them yet."""
    document = json.loads(results.to_json(evaluation))
    for name in ("benchmark", "conditions", "instructions", "traces"):
        del document[name]
    for policy in document["policies"]:
        for name in ("layers", "bytes_by_part", "manifest_sha256"):
            del policy[name]
    earlier = results.from_json(json.dumps(document))
    assert earlier.benchmark == "MT10" and not (earlier.conditions or earlier.instructions or earlier.traces)
    assert not any(policy.layers or policy.bytes_by_part or policy.manifest_sha256 for policy in earlier.policies)
    assert [policy.episodes for policy in earlier.policies] == [policy.episodes for policy in evaluation.policies]
    assert results.from_json(results.to_json(earlier)) == earlier
    assert "Error of each quantized linear" not in report.html(earlier)


def test_wrong_requests_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="two policies are called 'full precision'"):
        evaluate(Candidate(full_precision), Candidate(full_precision))
    with pytest.raises(ValueError, match="not an evaluation seed"):
        evaluate(Candidate(full_precision), first_seed=500_000)
    with pytest.raises(ValueError, match="at least one policy"):
        evaluate()
    with pytest.raises(FileNotFoundError, match="missing does not exist"):
        evaluate(Candidate(full_precision, tmp_path / "missing"))


def test_a_policy_equal_to_the_reference_can_be_plotted() -> None:
    same = evaluate(Candidate(full_precision), Candidate(full_precision_again), episodes_per_task=1)
    assert same.policies[1].fidelity is not None and same.policies[1].fidelity.normalized_mse == 0
    assert report.html(same).count("<svg") == 4
