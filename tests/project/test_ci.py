"""The files that a public host reads name what there is, and the scripts of `.ci` work."""

import pathlib
import re
import runpy
import tarfile
import zipfile

import pytest

yaml = pytest.importorskip("yaml")
pytestmark = pytest.mark.every

ROOT = pathlib.Path(__file__).parents[2]
WORKFLOWS = {
    path.stem: yaml.safe_load(path.read_text())
    for path in ROOT.glob(".github/workflows/*.yml")
}
JOBS = {
    f"{name}.{key}": job
    for name, flow in WORKFLOWS.items()
    for key, job in flow["jobs"].items()
}
FORMS = {
    path.stem: yaml.safe_load(path.read_text())
    for path in ROOT.glob(".github/ISSUE_TEMPLATE/*.yml")
}
RELEASE, DIST, NEWCOMER = (
    runpy.run_path(str(ROOT / ".ci" / name))
    for name in ("release_notes.py", "check_dist.py", "newcomer")
)


def commands(job):
    """Return what the steps of a job run."""
    return "\n".join(step.get("run", "") for step in job["steps"])


def test_there_is_a_workflow_for_changes_one_for_new_versions_of_jax_one_for_releases():
    # PyYAML reads the key `on` as True.
    triggers = {name: set(flow[True]) for name, flow in WORKFLOWS.items()}
    assert set(triggers) == {"ci", "nightly", "release"}
    assert {"pull_request", "push", "schedule"} <= triggers["ci"]
    assert "pull_request" not in triggers["nightly"]
    assert WORKFLOWS["release"][True] == {"push": {"tags": ["v*"]}}


@pytest.mark.parametrize("name", JOBS)
def test_a_job_ends_by_itself_and_may_do_no_more_than_it_needs(name):
    job = JOBS[name]
    assert 0 < job["timeout-minutes"] <= 180
    assert WORKFLOWS[name.split(".")[0]]["permissions"] == {"contents": "read"}
    rights = {"release.publish": "id-token", "release.notes": "contents"}
    expected = {rights[name]: "write"} if name in rights else {}
    assert job.get("permissions", {}) == expected


def test_targets_and_files_that_workflows_name_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    targets.add(".venv/bin/installed")
    used, files = set(), set()
    for job in JOBS.values():
        for line in re.findall(r"^make (.*)", commands(job), re.MULTILINE):
            used |= set(line.split())
        files |= set(re.findall(r"\.ci/[\w.]+", commands(job)))
    assert {"lint", "types", "test", "docs"} <= used <= targets
    assert {".ci/run", ".ci/newcomer", ".ci/lowest"} < files
    for file in files:
        path = ROOT / file
        assert path.exists(), file
        assert path.suffix == ".py" or path.stat().st_mode & 0o100, file


def test_actions_are_pinned_to_a_commit():
    seen = 0
    for path in ROOT.glob(".github/workflows/*.yml"):
        for line in re.findall(r"uses: (.*)", path.read_text()):
            seen += 1
            assert line == "pypa/gh-action-pypi-publish@release/v1" or re.fullmatch(
                r"actions/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line
            ), line
    assert seen > 10


def test_a_report_of_a_bug_says_what_was_checked_with_what_and_how_to_repeat_it():
    assert set(FORMS) == {"bug", "question", "config"}
    for name in ("bug", "question"):
        body = FORMS[name]["body"]
        assert {"name", "description", "labels", "body"} == set(FORMS[name])
        assert all(entry["type"] in {"markdown", "textarea"} for entry in body)
        fields = [entry["id"] for entry in body if entry["type"] == "textarea"]
        assert len(fields) == len(set(fields))
    required = {
        entry["id"]: entry["attributes"]
        for entry in FORMS["bug"]["body"]
        if entry.get("validations", {}).get("required")
    }
    assert set(required) == {"what", "check", "script", "versions"}
    assert "verify.check(objective, tx, params, batch, grads)" in str(required["check"])
    for word in ("hfjax", "jax", "optax", "devices"):
        assert word in required["versions"]["description"]


def test_a_citation_has_what_its_format_requires():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors", "type"} <= set(citation)
    assert citation["type"] == "software"
    for reference in citation["references"]:
        assert {"type", "title", "authors"} <= set(reference)
    people = [a for r in citation["references"] for a in r["authors"]]
    assert {"Martens", "Sutskever"} == {a["family-names"] for a in people}


CHANGELOG = """# Changelog

## Unreleased

## [0.2.0] - 2027-01-02

### Added

- Two.

## 0.1.0

- One.
"""


def test_release_notes_are_the_section_of_the_version():
    notes = RELEASE["notes"]
    assert notes(CHANGELOG, "v0.2.0") == "### Added\n\n- Two."
    assert notes(CHANGELOG, "0.1.0") == "- One."
    for version in ("0.2", "Unreleased"):  # Not there, and empty.
        with pytest.raises(ValueError, match=f"nothing of {version}; it has"):
            notes(CHANGELOG, version)
    assert "### Added" in notes((ROOT / "CHANGELOG.md").read_text(), "Unreleased")


@pytest.fixture
def distributions(tmp_path):
    """Return a function that writes both files, without some names and with others."""

    def write(without=(), also=(), version="0.1.0"):
        files = DIST["in_checkout"]
        info = f"hfjax-{version}.dist-info"
        wheel = files("hfjax") | {f"{info}/METADATA", f"{info}/licenses/LICENSE"}
        sdist = files(*DIST["FOLDERS"]) | set(DIST["FILES"])
        for path in tmp_path.iterdir():
            path.unlink()
        name = f"hfjax-{version}"
        with zipfile.ZipFile(tmp_path / f"{name}-py3-none-any.whl", "w") as file:
            for each in (wheel | set(also)) - set(without):
                file.writestr(each, "")
        with tarfile.open(tmp_path / f"{name}.tar.gz", "w:gz") as file:
            for each in sdist - set(without):
                file.addfile(tarfile.TarInfo(f"{name}/{each}"))
        return tmp_path

    return write


def test_whole_distributions_have_no_faults(distributions):
    assert DIST["faults"](distributions(), "v0.1.0") == []


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"without": ["hfjax/solvers/cg.py"]}, "wheel lacks hfjax/solvers/cg.py"),
        ({"without": ["hfjax/py.typed"]}, "wheel lacks hfjax/py.typed"),
        ({"without": ["hfjax-0.1.0.dist-info/licenses/LICENSE"]}, "lacks the licence"),
        ({"also": ["tests/problems.py"]}, "should not have tests/problems.py"),
        ({"also": ["hfjax/test_cg.py"]}, "should not have hfjax/test_cg.py"),
        ({"without": ["tests/reference.py"]}, "distribution lacks tests/reference.py"),
        ({"without": ["CITATION.cff"]}, "distribution lacks CITATION.cff"),
        ({"without": ["docs/conf.py"]}, "distribution lacks docs/conf.py"),
        ({"without": [".ci/run"]}, "distribution lacks .ci/run"),
        ({"version": "0.2.0"}, "should be hfjax-0.1.0.tar.gz"),
    ],
)
def test_what_is_missing_or_too_much_is_named(distributions, changed, said):
    assert said in "\n".join(DIST["faults"](distributions(**changed), "v0.1.0"))


def test_a_folder_without_distributions_is_a_fault(tmp_path):
    assert "0 wheels and 0 sdists" in DIST["faults"](tmp_path)[0]


def test_a_newcomer_runs_the_first_two_examples_that_stand_alone():
    examples = NEWCOMER["examples"]
    whole, part = "```python\nimport hfjax, jax\n```\n", "```python\nx = 1\n```\n"
    assert examples(whole + part + 2 * whole) == ["import hfjax, jax\n"] * 2
    with pytest.raises(ValueError, match="first Python block"):
        examples(part + whole)
    assert examples((ROOT / "README.md").read_text())
