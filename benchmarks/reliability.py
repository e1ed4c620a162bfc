"""Run the plan of faults, R1 to R25: each fault, what is expected, the tests that show it, and what they said.

    python benchmarks/reliability.py

A fault is shown by tests, which are run here, by the page of a benchmark that takes too long for tests, or by both; a
fault without either is named as not tested. A test that is not there, fails or is skipped makes the row a failure.
Writes benchmarks/results/reliability.md.
"""

import os
import platform
import sys
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BAD = "tests/test_bad_inputs.py::test_a_mistake_gives_one_sentence_and_changes_nothing"
Row = tuple[str, str, list[str], list[str]]
PLAN: list[Row] = [  # fault, what is expected, tests (files, functions or cases), pages
    (
        "kill -9 of the server at any point of a round",
        "resumed to the same bytes, no update counted twice",
        ["tests/test_resume.py::test_death_at_fault_points", "tests/test_resume.py::test_a_real_kill_and_resume"],
        ["fault_points", "kill_and_resume", "failures"],
    ),
    (
        "kill -9 of a site in training",
        "started again, it goes on; the same bytes",
        ["tests/links/test_flower.py::test_a_site_that_lost_its_order_gets_it_again"],
        ["failures"],
    ),
    (
        "disk full, error or read-only at a write",
        "one sentence with path and bytes; can be resumed",
        [
            "tests/test_resume.py::test_a_disk_that_refuses",
            "tests/test_environment.py::test_a_disk_that_is_full",
            f"{BAD}[out cannot be written to]",
        ],
        ["fault_points"],
    ),
    (
        "torn, zeroed or bit-flipped checkpoint",
        "found by its checksum; the one before, with a notice; none whole: refused",
        [
            "tests/test_store.py::test_a_damaged_checkpoint_gives_way_to_the_one_before",
            "tests/test_store.py::test_every_single_flipped_bit_of_the_payload_is_found",
            "tests/test_store.py::test_nothing_whole_is_refused",
        ],
        [],
    ),
    (
        "power loss",
        "every image that the file system may keep comes back with all committed rounds",
        ["tests/test_power_loss.py"],
        [],
    ),
    ("clock jumps", "the same bytes", ["tests/test_environment.py::test_clocks_that_jump_change_nothing"], []),
    (
        "duplicate, late, replayed, re-ordered updates",
        "counted once; the result does not depend on arrival",
        [
            "tests/testing/test_network.py",
            "tests/core/test_round.py::test_duplicates_strangers_and_other_rounds_are_ignored_and_recorded",
            "tests/test_runs.py::test_order_does_not_matter",
        ],
        ["network", "failures"],
    ),
    (
        "slow clients",
        "past the deadline dropped by name, or the run ends with the names",
        [
            "tests/links/test_flower.py::test_a_late_site_is_lost_and_its_late_reply_is_refused",
            "tests/core/test_round.py::test_a_quorum_that_is_missed_ends_the_round_with_the_reasons",
        ],
        ["failures"],
    ),
    (
        "NaN or infinite loss at one client",
        "it stays with its client, is named, and never enters the adapter",
        [
            "tests/site/test_cohort.py::test_nan_stays_with_its_client",
            "tests/core/test_round.py::test_a_nan_has_a_policy_of_its_own",
            "tests/core/test_round.py::test_a_server_step_that_diverges_is_named",
        ],
        [],
    ),
    (
        "out of memory",
        "the block is halved and nothing is lost; one sentence where a single client is too much",
        [
            "tests/site/test_cohort.py::test_out_of_memory_halves_the_block_and_loses_nothing",
            "tests/test_environment.py::test_little_memory_is_one_sentence",
        ],
        [],
    ),
    (
        "corrupted lines of JSONL",
        "refused with file and line, or skipped, counted, up to a cap",
        [
            "tests/data/test_records.py::test_a_bad_line_is_refused_by_place_and_reason",
            "tests/data/test_records.py::test_a_bad_line_is_skipped_alone",
            "tests/data/test_records.py::test_skipping_up_to_the_cap",
        ],
        ["bad_inputs"],
    ),
    (
        "an empty shard, fewer records than a batch",
        "refused before the start, or trained with what is there",
        [
            f"{BAD}[empty file]",
            f"{BAD}[only empty lines]",
            f"{BAD}[more clients than records]",
            "tests/site/test_cohort.py::test_batches_cover_every_epoch_once_and_depend_on_their_address",
        ],
        [],
    ),
    (
        "label sets that differ",
        "refused before the start with the difference",
        ["tests/deploy/test_agree.py", f"{BAD}[an unknown label in the test]"],
        [],
    ),
    (
        "another tokenizer, base, configuration or library",
        "refused with the difference; versions are a notice",
        [
            "tests/test_fingerprints.py",
            "tests/deploy/test_agree.py",
            "tests/test_resume.py::test_another_base_is_refused_on_resume",
        ],
        ["failures"],
    ),
    (
        "another version of the protocol",
        "refused with both versions",
        ["tests/links/test_wire.py::test_another_version_is_named"],
        [],
    ),
    (
        "network cut in an upload, reset, restarted peer",
        "sent again; nothing is lost or counted twice",
        [
            "tests/links/test_flower.py::test_a_restarted_coordinator_is_found_again",
            "tests/links/test_flower.py::test_a_site_that_lost_its_order_gets_it_again",
        ],
        ["failures"],
    ),
    (
        "SIGTERM and Ctrl-C",
        "the write in progress is finished, how to resume is said, exit 143 and 130",
        ["tests/test_signals.py"],
        [],
    ),
    (
        "two processes in one folder",
        "the second is refused",
        ["tests/test_store.py::test_two_processes_cannot_hold_one_folder"],
        [],
    ),
    ("100,000 registered clients", "no more memory than 1,000", [], ["scale"]),
    (
        "a large adapter and many clients",
        "the server's memory is that of the sum and one update",
        [],
        ["secure", "overhead", "memory"],
    ),
    ("200 rounds", "memory grows less than 5 percent, open files constant", [], ["soak"]),
    (
        "the job changed between crash and resume",
        "refused with the keys that changed",
        [f"{BAD}[resume with a changed job]", "tests/test_fingerprints.py"],
        [],
    ),
    (
        "a checkpoint of another version or job",
        "refused politely",
        [
            "tests/test_store.py::test_another_job_or_format_is_refused",
            f"{BAD}[checkpoint of another format]",
            f"{BAD}[checkpoint of another job]",
        ],
        [],
    ),
    (
        "odd paths, a plain locale, no home, no network",
        "works",
        ["tests/test_environment.py::test_odd_paths_a_plain_locale_no_home_and_no_network"],
        [],
    ),
    (
        "the same seed twice, another hash seed, another seed",
        "the same bytes on one machine; another seed gives others",
        [
            "tests/test_runs.py::test_the_hash_seed_of_python_does_not_matter",
            "tests/test_runs.py::test_order_does_not_matter",
            "tests/test_runs.py::test_another_seed_matters",
        ],
        [],
    ),
]
NOT_TESTED = {
    16: "an upload cut at every byte, a half-open connection and a line of one byte a second",
    20: "a coordinator over weeks: memory is measured over minutes",
    25: "two different machines: the bytes are promised for one platform, one version and one number of threads",
    10: "the kernel's own kill for memory: it is a kill -9, which row 1 and 2 cover",
}


class Outcomes:
    """Collects how each test ended."""

    def __init__(self) -> None:
        self.ended: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.ended[report.nodeid] = report.outcome


def of(test: str, ended: dict[str, str]) -> dict[str, int]:
    """Count the outcomes of a file, a function with all its cases, or one case."""
    counts: dict[str, int] = defaultdict(int)
    for node, outcome in ended.items():
        if node == test or node.startswith((f"{test}::", f"{test}[")):
            counts[outcome] += 1
    return dict(counts)


def main() -> None:
    os.chdir(ROOT)
    outcomes = Outcomes()
    asked = sorted({test for _, _, tests, _ in PLAN for test in tests})
    pytest.main(["-q", "--no-header", "-o", "addopts=", "-p", "no:cacheprovider", *asked], plugins=[outcomes])
    text = (
        "# The plan of faults\n\nTests were run for this page; pages stand beside it. Machine: "
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}. Command: "
        "`python benchmarks/reliability.py`.\n\n| | fault | expected | shown by | result |\n|---|---|---|---|---|\n"
    )
    failures = 0
    for number, (fault, expected, tests, pages) in enumerate(PLAN, start=1):
        counts = {test: of(test, outcomes.ended) for test in tests}
        passed = sum(count.get("passed", 0) for count in counts.values())
        wrong = [test for test, count in counts.items() if set(count) != {"passed"}]
        wrong += [page for page in pages if not (RESULTS / f"{page}.md").is_file()]
        failures += bool(wrong)
        shown = [f"`{test.removeprefix('tests/')}`" for test in tests] + [f"[{page}]({page}.md)" for page in pages]
        said = f"NOT SHOWN: {', '.join(wrong)}" if wrong else f"{passed} passed" if tests else "see the page"
        text += f"| R{number} | {fault} | {expected} | {'<br>'.join(shown)} | {said} |\n"
    text += "\nNot tested:\n\n" + "".join(f"- R{number}: {what}.\n" for number, what in sorted(NOT_TESTED.items()))
    (RESULTS / "reliability.md").write_text(text, encoding="utf8")
    print(f"{len(PLAN)} faults, {failures} not shown")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
