"""`crushkv fidelity`, `sweep`, `report` and `eval` as a user runs them, on the embedded model."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from crushkv.cli import main
from crushkv.embedded import embedded_model_path
from evaluation_models import byte_model, byte_tokenizer
from interrupts import heed_interrupts

SHARED = Path(__file__).parents[2] / "shared" / "data"
CONFIGS = ["--config", "full", "--config", "snapkv:budget={0.5,0.25},representative_share=0.1"]


class Outcome(NamedTuple):
    stdout: str
    stderr: str


@pytest.fixture
def crushkv(capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    def call(*args: object, code: int = 0) -> Outcome:
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            main([str(arg) for arg in args])
        outcome = Outcome(*capfd.readouterr())
        assert end.value.code == code, outcome.stderr
        return outcome

    return call


@pytest.mark.model
def test_fidelity_prints_one_object_a_configuration(crushkv: Callable[..., Outcome]) -> None:
    done = crushkv("fidelity", "--tasks", "retrieval_single_1k", "--limit", 2, *CONFIGS, "--json")
    full, half, quarter = (json.loads(line) for line in done.stdout.splitlines())
    assert [full["name"], half["name"]] == ["full", "snapkv:budget=0.5,representative_share=0.1"]
    assert full["kl"] == 0 and full["agreement"] == 1 and full["bytes_fraction"] == 1
    assert 0 < half["kl"] < quarter["kl"] and half["prompts"] == quarter["prompts"] == 2
    assert 0.45 < half["bytes_fraction"] <= 0.5 and 0.2 < quarter["bytes_fraction"] <= 0.25
    assert 0 < full["gold_nll"] < 1 and quarter["gold_nll"] > 0
    assert "[2/2] retrieval_single_1k" in done.stderr and "left" in done.stderr
    # Of two prompts, the mean and the median are the same, and the worst is one of them.
    assert quarter["kl_median"] == pytest.approx(quarter["kl"])
    assert quarter["kl"] < quarter["kl_percentile_95"] < quarter["kl_worst"]
    assert quarter["worst_prompt"]["task"] == "retrieval_single_1k" and quarter["worst_prompt"]["id"] in ("0", "1")


@pytest.mark.model
def test_fidelity_prints_the_worst_prompt_and_takes_the_default_policy(crushkv: Callable[..., Outcome]) -> None:
    done = crushkv("fidelity", "--tasks", "retrieval_single_1k", "--limit", 2, "--config", "budget={0.5,0.25}")
    assert "1  budget=0.5 (2 prompts)" in done.stdout and "2  budget=0.25 (2 prompts)" in done.stdout
    header = next(line.split() for line in done.stdout.splitlines() if "median" in line)
    row = next(line for line in done.stdout.splitlines() if line.split()[:1] == ["2"] and line.rstrip().endswith("%"))
    assert header == ["KL", "95", "%", "median", "p95", "worst", "agree", "NLL", "bytes"] and "…" not in done.stdout
    _, kl, low, _, high, median, p95, worst, *_ = row.split()
    assert float(low) <= float(kl) <= float(high) and float(median) <= float(p95) <= float(worst)
    assert "2  worst: retrieval_single_1k " in done.stdout


@pytest.mark.model
def test_longbench_records_from_a_folder(crushkv: Callable[..., Outcome]) -> None:
    folder = SHARED / "longbench"
    if not folder.is_dir():
        pytest.skip("no LongBench records beside the checkout")
    done = crushkv("fidelity", "--data-dir", folder, "--tasks", "trec_short_1k", "--limit", 1, *CONFIGS, "--json")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["prompts"] for line in lines] == [1, 1, 1] and lines[1]["kl"] > 0


@pytest.mark.model
def test_a_sweep_survives_ctrl_c_and_becomes_a_page(tmp_path: Path, crushkv: Callable[..., Outcome]) -> None:
    file, output, page = tmp_path / "sweep.yaml", tmp_path / "results.jsonl", tmp_path / "report.html"
    file.write_text(
        "tasks: [retrieval_single_1k]\nlimit: 2\nmeasures: [fidelity, score]\nanswer_tokens: 8\n"
        "configurations: [full, 'snapkv:budget=0.25,page_size={1,16},representative_share={0,0.25}']\n",
        encoding="utf-8",
    )
    command = [sys.executable, "-m", "crushkv", "sweep", str(file), "-o", str(output)]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_interrupts,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    deadline = time.monotonic() + 300
    while (not output.exists() or not output.read_bytes().count(b"\n")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, messages = process.communicate(timeout=120)
    assert process.returncode == 130 and "interrupted" in messages and "goes on from there" in messages
    kept = output.read_bytes().count(b"\n")
    assert 1 <= kept < 10
    done = crushkv("sweep", file, "-o", output)
    assert f"{kept} samples are there from an earlier run" in done.stderr
    lines = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert len(lines) == 10 and len({(line["id"], line["name"]) for line in lines}) == 10
    assert {line["score"] for line in lines if line["name"] == "full"} == {1.0}
    crushkv("report", output, "-o", page, "--plots", tmp_path / "plots")
    assert page.stat().st_size > 50_000
    assert (tmp_path / "plots" / "score-by-bytes.png").is_file() and (tmp_path / "plots" / "kl-by-bytes.svg").is_file()


def test_a_model_folder_behind_its_chat_template_beside_another(
    tmp_path: Path, crushkv: Callable[..., Outcome]
) -> None:
    first, second = tmp_path / "one", tmp_path / "two"
    for folder in (first, second):
        byte_model().save_pretrained(folder)
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = "{% for message in messages %}<user>{{ message['content'] }}<bot>{% endfor %}"
        tokenizer.save_pretrained(folder)
    data = tmp_path / "data"
    data.mkdir()
    fields = {"context": "Ice is cold. " * 20, "answers": ["cold"], "length": 9, "language": "en", "all_classes": None}
    lines = [{"_id": str(i), "input": f"What is ice, {i}?", "dataset": "qasper", **fields} for i in range(2)]
    (data / "qasper.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    file = tmp_path / "sweep.yaml"
    file.write_text("tasks: [qasper]\nanswer_tokens: 4\nconfigurations: [full, budget=0.5]\n", encoding="utf-8")
    samples = {}
    for folder, chat in ((first, []), (second, ["--chat"])):
        output = folder.with_suffix(".jsonl")
        crushkv("sweep", file, "--model", folder, "--data-dir", data, "-o", output, *chat)
        samples[folder] = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
        assert {s["model"]["name"] for s in samples[folder]} == {str(folder)} and len(samples[folder]) == 4
        assert {s["settings"]["chat"] for s in samples[folder]} == {bool(chat)}
    # The template's own tokens are the difference: a byte each.
    longer = samples[second][0]["prompt_tokens"] - samples[first][0]["prompt_tokens"]
    assert longer == len("<user><bot>")
    page = tmp_path / "report.html"
    crushkv("report", *(folder.with_suffix(".jsonl") for folder in samples), "-o", page)
    text = page.read_text(encoding="utf-8")
    for folder in samples:
        assert f"<td>budget=0.5<small>{folder}</small></td>" in text


@pytest.mark.model
def test_harness_tasks_with_a_compressed_cache(tmp_path: Path, crushkv: Callable[..., Outcome]) -> None:
    output = tmp_path / "eval.json"
    task = ["--tasks", "retrieval_single_1k", "--limit", 2]
    result = json.loads(crushkv("eval", *task, "--budget", "0.5", "--json", "-o", output).stdout)
    assert result["prompts"] == {"retrieval_single_1k": 2}
    assert 0 <= result["tasks"]["retrieval_single_1k"]["score"] <= 1 and result["config"]["budget"] == 0.5
    samples = json.loads(output.read_text(encoding="utf-8"))["samples"]["retrieval_single_1k"]
    assert len(samples) == 2 and all(sample["resps"] for sample in samples)
    full = json.loads(crushkv("eval", *task, "--full", "--json").stdout)
    assert full["config"] is None and full["tasks"]["retrieval_single_1k"]["score"] == 1


@pytest.mark.model
def test_the_harness_own_command_line_knows_the_model(tmp_path: Path, crushkv: Callable[..., Outcome]) -> None:
    """A task of the user's own, in the harness's format, through `lm_eval`'s options."""
    (tmp_path / "data.jsonl").write_text('{"q": "2 + 2 =", "a": "4"}\n{"q": "3 + 3 =", "a": "6"}\n', encoding="utf-8")
    (tmp_path / "sums.yaml").write_text(
        "task: sums\ndataset_path: json\ndataset_kwargs:\n  data_files:\n"
        f"    test: {tmp_path / 'data.jsonl'}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: ['4', '6']\n"
        'doc_to_target: \'{{["4", "6"].index(a)}}\'\nmetric_list:\n  - metric: acc\n',
        encoding="utf-8",
    )
    arguments = f"pretrained={embedded_model_path()},policy=h2o,budget=0.5"
    done = crushkv(
        "lm-eval", "--model", "crushkv", "--model_args", arguments, "--tasks", "sums", "--include_path", tmp_path,
        "--output_path", tmp_path / "out.json", "--device", "cpu",
    )  # fmt: skip
    assert "sums" in done.stdout and "acc" in done.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["fidelity", "--config", "snapvk"], "snapkv"),
        (["fidelity", "--tasks", "retrieval_singel_1k"], "retrieval_single_1k"),
        (["fidelity", "--data-dir", "/none", "--tasks", "qasper"], "no such folder"),
        (["fidelity", "--answer-tokens", "1"], "answer-tokens"),
        (["sweep", "/none.yaml"], "none.yaml"),
        (["eval", "--tasks", "qaspr"], "qasper"),
        (["eval", "--budget", "nope"], "budget"),
        (["report", "/none.jsonl"], "none.jsonl"),
        (["report", "x.jsonl", "-o", "/none/report.html"], "folder does not exist"),
    ],
)
@pytest.mark.model
def test_what_is_wrong_is_said_in_one_line(
    args: list[str], message: str, crushkv: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The harness's log still writes to the stream of an earlier test, which is closed.
    monkeypatch.setattr(logging, "raiseExceptions", False)
    done = crushkv(*args, code=1 if args[:2] == ["report", "/none.jsonl"] else 2)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0] and "Traceback" not in done.stderr
