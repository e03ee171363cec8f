"""What benchmarks leave behind: rows on disk, the ledger of kernels, tables, verdicts."""

import json
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import __main__ as cli
from benchmarks import families
from benchmarks.harness import environment, evidence, ledger, report, rows
from benchmarks.harness.compare import BROKEN, compare_recorded, compare_trees, failed, table
from benchmarks.harness.ledger import ROOT, fingerprint, kernels
from benchmarks.harness.measure import Settings
from benchmarks.harness.rows import BadRecord, Document, Row
from inferix_kernels import verdict

HEADER = {
    "date": "2026-11-21T12:00:00+00:00", "device": "NVIDIA H200", "architecture": "sm_90", "commit": "abc", "note": "",
    "dirty": False, "kernels": ledger.fingerprints(), "settings": {"threads": 1, "timer": "wall", "cold": True},
    "software": {"torch": "2.11.0"},
}  # fmt: skip


def a_row(contender="ours-compiled", format="bf16", seconds=(1e-3,) * 20, **more):
    more = {"kernel": "cuda/kv_pages", "nbytes": 1_000_000, "status": "ok"} | more
    return Row("kv_pages", "append", "tiny", contender, format, "cuda", seconds=list(seconds), **more)


def peaks(copy=1.0, matmul=1.0):
    """The machine itself, slower by these factors."""
    return [
        a_row("peak-copy", "", [copy * 2e-3] * 20, kernel=""),
        a_row("peak-matmul", "bf16", [matmul * 5e-3] * 20, kernel="", flops=1e9),
    ]


@pytest.mark.parametrize("name", ["run.json", "run.jsonl"])
def test_rows_come_back_as_they_were_written(tmp_path, name):
    given = [a_row(), a_row("sage", "int8", [], status="absent", note="pip install sage"), *peaks()]
    Document(HEADER, given).save(tmp_path / name)
    back = Document.load(tmp_path / name)
    assert back.header == HEADER and back.rows == given


def test_rows_are_added_and_a_case_measured_again_replaces_its_first(tmp_path):
    path = tmp_path / "run.jsonl"
    rows.append(path, HEADER, [a_row()])
    rows.append(path, HEADER, [a_row(seconds=[2e-3]), a_row(format="int8")])
    back = Document.load(path)
    assert [(row.format, row.median) for row in back.rows] == [("bf16", 2e-3), ("int8", 1e-3)]
    assert a_row(metrics={"x": 1}).key != a_row(metrics={"x": 2}).key


def test_what_a_crash_or_a_full_disk_leaves_is_whole(tmp_path):
    """A file may grow to a limit here, which is a disk that has no more room; a line without its end is a crash's."""
    path = tmp_path / "run.jsonl"
    rows.append(path, HEADER, [a_row()])
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"family": "kv_pa')
    assert [row.format for row in Document.load(path).rows] == ["bf16"]
    code = (
        "import resource, signal, sys; from pathlib import Path\n"
        "from tests.benchmarks.test_benchmark_records import HEADER, a_row, rows\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({len(whole) + 100},) * 2)\n"
        f"try: rows.append(Path({str(path)!r}), HEADER, [a_row(format='int8')])\n"
        "except ValueError as error: print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.startswith(f"--json: cannot write {str(path)!r}"), result.stderr
    assert path.read_bytes() == whole
    rows.append(path, HEADER, [a_row(format="int8")])
    assert [row.format for row in Document.load(path).rows] == ["bf16", "int8"]
    path.write_bytes(b'{"schema": 1, "hea')  # cut off in its first line: it is begun again
    rows.append(path, HEADER, [a_row()])
    assert Document.load(path).header == HEADER


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "must hold a run of the benchmarks"),
        ("[]", "must hold a run of the benchmarks"),
        ('{"schema": 0, "header": {}, "rows": []}', "must begin with schema 1"),
        ('{"schema": 1, "header": {}, "rows": {}}', "must hold a list of rows"),
        ('{"schema": 1, "header": {}, "rows": [{"family": "a"}]}', "row 0: op is missing"),
        ('{"schema": 1, "header": {}, "rows": [ROW, {}]}', "row 1: family is missing"),
        ('{"schema": 1, "header": {}, "rows": [ROW_status_fine]}', "status must be one of"),
        ('{"schema": 1, "header": {}, "rows": [ROW_colour_red]}', "colour is no field"),
        ('{"schema": 1, "header": {}, "rows": [ROW_shape_3]}', "shape must be str, got 3"),
        ('{"schema": 1, "header": {}, "rows": [ROW_seconds_soon]}', "seconds must be list"),
    ],
)
def test_a_file_that_is_no_record_is_refused_by_name(tmp_path, text, message):
    whole = {name: "x" for name in rows._REQUIRED} | {"status": "ok"}
    for change in ("_status_fine", "_colour_red", "_shape_3", "_seconds_soon", ""):
        name, _, value = change[1:].partition("_")
        changed = whole | ({name: int(value) if value.isdigit() else value} if name else {})
        text = text.replace(f"ROW{change}", json.dumps(changed))
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(BadRecord, match=message) as error:
        Document.load(path)
    assert "bad.json" in str(error.value)


def test_every_source_is_part_of_a_kernel():
    named = {path for kernel in kernels() for path in ledger.files_of(kernel)}
    native = {path for path in (ROOT / "csrc").rglob("*") if path.suffix in {".cpp", ".cu", ".h", ".cuh"}}
    triton = set((ROOT / "inferix_kernels" / "triton_kernels").rglob("*.py"))
    others = {"csrc/bindings.cpp", "csrc/dlpack.h", "csrc/spans.cpp"}
    assert {str(path.relative_to(ROOT)) for path in (native | triton) - named} <= others
    assert {f"cpu/{family}" for family in ledger.FORMATS} <= set(kernels())


def test_a_file_belongs_to_the_family_it_is_named_after_or_to_all():
    files = {kernel: {str(path.relative_to(ROOT)) for path in ledger.files_of(kernel)} for kernel in kernels()}
    assert "csrc/cpu/attention.cpp" in files["cpu/attention"] and "csrc/cpu/attention.cpp" not in files["cpu/qkv"]
    for kernel in ("cpu/attention", "cpu/kv_pages", "cpu/qkv", "cpu/linear"):
        assert {"csrc/cpu/parallel.cpp", "csrc/cpu/simd.h"} <= files[kernel]
    assert "csrc/linear.h" not in files["cpu/attention"] and "csrc/linear.h" in files["cpu/linear"]


def test_every_kernel_is_measured_in_every_format():
    measured = {
        (contender.kernel, contender.format)
        for device in ("cpu", "cuda")
        for family in families.FAMILIES
        for case in families.cases(family, ["smoke"], device)
        for contender in case.contenders
    }
    assert {(name, format) for name, formats in kernels().items() for format in formats} <= measured


def test_a_change_in_a_header_changes_the_hash_of_who_includes_it(tmp_path):
    for source in ("csrc", "inferix_kernels"):
        subprocess.run(["cp", "-r", ROOT / source, tmp_path / source], check=True)
    before = {kernel: fingerprint(kernel, tmp_path) for kernel in kernels()}
    assert before == ledger.fingerprints()
    fingerprint.cache_clear()
    header = tmp_path / "csrc" / "cuda" / "elements.cuh"
    header.write_text(header.read_text() + "\n// changed\n")
    changed = {kernel for kernel in kernels() if before[kernel] != fingerprint(kernel, tmp_path)}
    assert changed == {kernel for kernel in kernels() if header in ledger.files_of(kernel, tmp_path)} != set()


def told(*documents, kernel="cuda/kv_pages", format="bf16"):
    (line,) = [e for e in evidence.evidence(documents) if (e.kernel, e.format) == (kernel, format)]
    return line


def at(date, **more):
    return {**HEADER, "date": date, **more}


def test_evidence_says_whether_a_measurement_still_holds():
    old = {"kernels": {**HEADER["kernels"], "cuda/kv_pages": "0" * 16}}
    assert told().words == "never run on a GPU" and told(kernel="cpu/qkv").words == "never measured"
    assert told(Document(HEADER, [a_row()])).words == "measured at this source"
    assert told(Document(at("2026-11-20", **old), [a_row()])).words == "measured at an older source"
    both = Document(HEADER, [a_row()]), Document(at("2026-12-01", **old), [a_row()])
    assert told(*both).date == "2026-11-21"  # what holds today is said, not what came last
    assert told(Document(HEADER, [a_row(seconds=[], status="wrong")])).words == "WRONG"
    refused = Document(HEADER, [a_row(seconds=[], status="unsupported")])
    assert told(refused).words == "refused at this source" and not evidence.stale([told(refused)])
    for status in ("failed", "absent"):
        assert told(Document(HEADER, [a_row(seconds=[], status=status)])).words == "never run on a GPU"
    lines = [told(Document(HEADER, [a_row()])), told()]
    assert evidence.stale(lines) == lines[1:]


def test_evidence_fails_a_release_on_what_is_stale(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evidence, "RECORDS", tmp_path)
    monkeypatch.setattr(evidence.load_records, "__defaults__", (tmp_path,))
    assert cli.main(["evidence"]) == 0 and cli.main(["evidence", "--fail-on-stale"]) == 1
    measured = [a_row(format=format) for format in kernels()["cuda/kv_pages"]]
    Document(HEADER, measured).save(tmp_path / "nvidia-h200" / "a.jsonl")
    assert cli.main(["evidence", "--fail-on-stale", "--only", "cuda/kv_pages"]) == 0
    assert "measured at this source | 2026-11-21 | NVIDIA H200" in capsys.readouterr().out


def test_the_records_in_the_repository_can_be_read():
    for record in evidence.load_records():
        assert record.rows and environment.slug(record.header["device"])


def test_report_fills_marked_tables_and_leaves_the_rest(tmp_path):
    mark = "<!-- made by: python -m benchmarks report kv_pages --device cuda -->\n"
    text = f"# Title\n\n{mark}old\n<!-- end -->\ntail <!-- made by: python -m other -->\nkept\n<!-- end -->\n"
    path = tmp_path / "README.md"
    path.write_text(text)
    old, new = (
        Document(at(date), [a_row(seconds=[s] * 5), *peaks()]) for date, s in (("2026-01-01", 1), ("2026-02-01", 2e-3))
    )
    new.rows.append(a_row("flashinfer", seconds=[4e-3] * 5, kernel=""))
    assert report.update([path], [old, new]) == [path]
    made = path.read_text()
    assert made.startswith(f"# Title\n\n{mark}| op ") and "old" not in made
    assert "tail <!-- made by: python -m other -->\nkept\n<!-- end -->\n" in made
    (line,) = [line for line in made.splitlines() if "ours-compiled" in line]
    assert "2 ms" in line and "2.00" in line  # the newest record, twice as fast as the best peer
    assert "*NVIDIA H200, sm_90, 1 threads, torch 2.11.0, 2026-02-01, commit abc*" in made
    assert report.update([path], [old, new]) == []
    assert "*No record yet.*" in report.rewrite(text, [])
    with pytest.raises(ValueError, match="report kv_pages --colour"):
        report.rewrite(text.replace("--device cuda", "--colour red"), [])


def noisy(scale=1.0, rounds=40, noise=0.03, seed=0):
    return (scale * 1e-3 * np.random.default_rng(seed).lognormal(0, noise, rounds)).tolist()


@pytest.mark.parametrize(
    "ratio, said", [(1.0, "SAME"), (1.02, "SAME"), (1.3, "SLOWER"), (0.7, "FASTER"), (1.05, "UNSURE")]
)
def test_a_verdict_rests_on_its_interval(ratio, said):
    assert verdict.unpaired(noisy(), noisy(ratio, seed=1)).verdict() == said
    assert verdict.paired(noisy(), noisy(ratio, seed=1)).verdict() == said


def test_few_rounds_or_much_noise_say_unsure():
    assert verdict.unpaired([1e-3] * 6, [2e-3] * 6).verdict() == "UNSURE"
    assert verdict.unpaired(noisy(noise=0.5), noisy(noise=0.5, seed=1)).verdict() == "UNSURE"


def test_what_disturbs_both_sides_of_a_round_is_no_difference():
    drift = np.random.default_rng(2).lognormal(0, 0.5, 60)
    a, b = (np.array(noisy(rounds=60, noise=0.01, seed=seed)) * drift for seed in (0, 1))
    assert verdict.paired(a.tolist(), b.tolist()).verdict() == "SAME"
    assert verdict.unpaired(a.tolist(), b.tolist()).verdict() == "UNSURE"


def test_intervals_hold_what_they_promise():
    """Of 200 pairs of runs of the same thing none is called slower or faster, and 95 % of the intervals hold 1."""
    intervals = [verdict.unpaired(noisy(seed=2 * n, rounds=20), noisy(seed=2 * n + 1, rounds=20)) for n in range(200)]
    assert not {interval.verdict() for interval in intervals} & {"SLOWER", "FASTER"}
    assert sum(interval.low <= 1 <= interval.high for interval in intervals) >= 180


def test_recorded_runs_on_a_machine_that_changed_are_not_told_apart_from_it():
    a = Document(HEADER, [a_row(seconds=noisy()), *peaks()])
    same = Document(HEADER, [a_row(seconds=noisy(seed=1)), *peaks()])
    slower_machine = Document(HEADER, [a_row(seconds=noisy(1.2, seed=1)), *peaks(1.2)])
    slower_kernel = Document(HEADER, [a_row(seconds=noisy(1.2, seed=1)), *peaks()])
    far_slower = Document(HEADER, [a_row(seconds=noisy(2.0, seed=1)), *peaks(1.2)])
    no_concern = Document(HEADER, [a_row(seconds=noisy(seed=1)), *peaks(matmul=1.2)])  # the row is bound by the copy
    others = (same, slower_machine, slower_kernel, far_slower, no_concern)
    assert [compare_recorded(a, b)[0].verdict for b in others] == ["SAME", "UNSURE", "SLOWER", "SLOWER", "SAME"]


def test_a_row_that_went_wrong_is_broken_and_other_devices_are_not_compared():
    a = Document(HEADER, [a_row(seconds=noisy()), *peaks()])
    b = Document(HEADER, [a_row(seconds=[], status="wrong", note="error 1.0"), *peaks()])
    (line,) = lines = compare_recorded(a, b)
    assert line.verdict == BROKEN and failed(lines) and "wrong: error 1.0" in table(lines)
    assert not failed(compare_recorded(a, a))
    with pytest.raises(ValueError, match="must be of one device"):
        compare_recorded(a, Document({**HEADER, "device": "NVIDIA A100"}, a.rows))
    with pytest.raises(ValueError, match="rows in common"):
        compare_recorded(a, Document(HEADER, []))


def test_two_trees_are_measured_in_turns_each_with_its_own_kernels(tmp_path):
    """The other tree's gather answers with what is not in the pages: its rows are broken, all others compared."""
    other = tmp_path / "tree"
    other.mkdir()
    subprocess.run(["cp", "-r", ROOT / "inferix_kernels", ROOT / "python", other], check=True)
    path = other / "inferix_kernels" / "compiled.py"
    text = path.read_text()
    assert "def kv_gather(" in text
    path.write_text(text + "\n_gather = kv_gather\n\n\ndef kv_gather(pools, where, dtype, *, out):\n"
                    "    _gather(pools, where, dtype, out=out)\n    out[0].add_(1)\n    return out\n")  # fmt: skip
    settings = Settings(rounds=10, seconds=2, timer="cpu", small=True, backends=("ours",), formats=("int8",))
    cases = [("kv_pages", "smoke", 0), ("kv_pages", "smoke", 1)]
    appended, gathered = compare_trees([ROOT, other], cases, settings, 1, margin=0.5)
    assert [line.row.op for line in appended + gathered] == ["append-from-fp32", "gather-to-fp32"]
    assert appended[0].verdict in ("SAME", "UNSURE") and len(appended[0].row.seconds) >= 10
    assert gathered[0].verdict == BROKEN and gathered[0].note.startswith("wrong: error")
