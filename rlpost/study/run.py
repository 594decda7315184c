"""A study from end to end: its runs, their updates, one table and one page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console, Group

from rlpost.analysis.report import write_report
from rlpost.exit_codes import FAILED
from rlpost.study import learning_page
from rlpost.study.learning import Learned, learned
from rlpost.study.page import render, write_page
from rlpost.study.plan import Study
from rlpost.study.results import ArmResult, arm_analysis, arm_result
from rlpost.study.runs import RunFailed, make_runs

PAGE, FIGURES = "study.html", "results.json"


def run_study(study: Study, name: str, console: Console) -> int:
    """Make what runs are missing, then compare all of them; returns the process's exit code."""
    try:
        make_runs(study, lambda line: console.print(line, markup=False, highlight=False))
    except RunFailed as error:
        console.print(str(error), markup=False)
        console.print("When that is mended, the same command goes on with it", markup=False)
        return FAILED
    console.print(_learning(study, name) if study.config.measure == "learning" else _updates(study, name))
    console.print(f"page: {study.directory / PAGE}, figures: {study.directory / FIGURES}", markup=False)
    return 0


def _learning(study: Study, name: str) -> Group:
    results = [learned(study, arm.name) for arm in study.config.arm]
    _write_figures(study, results)
    learning_page.write_page(study.directory / PAGE, name, results, goal=study.config.goal)
    return learning_page.render(results, study.config.goal)


def _updates(study: Study, name: str) -> Group:
    results, reports, analyses = [], {}, {}
    for arm in study.config.arm:
        analyses[arm.name] = arm_analysis(study, arm.name)
        results.append(arm_result(study, arm.name, analyses))
        report = study.of_arm(arm.name)[0].directory.parent / "report.html"
        write_report(report, analyses[arm.name])
        reports[arm.name] = str(report.relative_to(study.directory))
    _write_figures(study, results)
    write_page(study.directory / PAGE, name, results, reports=reports, dtype=study.config.dtype)
    return render(results)


def _write_figures(study: Study, results: Sequence[ArmResult] | Sequence[Learned]) -> None:
    (study.directory / FIGURES).write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n")
