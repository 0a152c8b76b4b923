"""Tasks, fidelity, sweeps and their results, on a tiny model over bytes."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from crushkv import CrushConfig, KVCrush
from crushkv.errors import ConfigError, CrushError
from crushkv.evaluation import (
    Reference,
    ResultsFile,
    Sample,
    Subject,
    Sweep,
    TaskSource,
    by_model,
    load_tasks,
    plan_work,
    prompts,
    read_report_samples,
    read_samples,
    retrieval,
    run_item,
)
from crushkv.evaluation.data import DataError
from crushkv.evaluation.decoding import Ending, greedy_answers
from crushkv.evaluation.recording import Recording
from crushkv.hf import CrushCache
from evaluation_models import byte_model, byte_tokenizer

pytest.importorskip("lm_eval")

SMALL: dict[str, Any] = {
    "min_tokens": 0,
    "sink": 2,
    "window": 8,
    "page_size": 4,
    "representative_share": 0.2,
    "interval": 0,
}


def record(number: int, **changes: Any) -> dict[str, Any]:
    """A record in LongBench's format."""
    facts = " ".join(f"Item {i} has the colour {'red' if i % 2 else 'blue'}." for i in range(number, number + 9))
    fields = {
        "_id": f"r{number}",
        "input": f"What colour has item {number}?",
        "context": facts,
        "answers": ["red" if number % 2 else "blue", "unanswerable"],
        "length": 9,
        "dataset": "qasper",
        "language": "en",
        "all_classes": None,
    }
    return {**fields, **changes}


def write(path: Path, *records: dict[str, Any] | str) -> Path:
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "papers.jsonl", *(record(i) for i in range(4)))
    return folder


@pytest.fixture(scope="module")
def subject(tokenizer: Any) -> Subject:
    return Subject(byte_model(), tokenizer, {"name": "bytes", "dtype": "float32", "device": "cpu"}, {"crushkv": "0"})


# Tasks


def test_a_local_file_takes_the_harness_prompt_and_metric(data: Path, tokenizer: Any) -> None:
    task = load_tasks(["papers"], TaskSource(data), tokenizer)["papers"]
    found = list(prompts(task, "papers"))
    assert [p.id for p in found] == ["r0", "r1", "r2", "r3"]
    first = found[1]
    # What the harness's own task says.
    from lm_eval.tasks import TaskManager

    own = TaskManager()._index["longbench_qasper"].cfg or {}
    assert first.max_tokens == 128 and first.metric == "score" and first.until == ()
    assert "Answer the question as concisely as you can" in first.text
    assert record(1)["context"] in first.text and first.text.endswith(f"Question: {record(1)['input']}\n\nAnswer:")
    assert first.gold == " red"
    assert first.score("red") == 1 and first.score("The colour is red") == pytest.approx(0.5)  # F1 without articles
    assert first.score("green") == 0
    assert own is not None


@pytest.mark.parametrize(
    ("name", "records", "message"),
    [
        ("absent", None, "papers"),
        ("papers2", [record(0, answers=[])], r"papers2\.jsonl:1: the record has no gold"),
        ("papers2", [record(0), record(1, answers=None)], r"papers2\.jsonl:2: the record has no gold"),
        ("papers2", [record(0), record(1, dataset="trec")], r":2: dataset 'trec'"),
        ("papers2", [record(0, dataset="qaspr")], "qasper"),
        ("papers2", [{"context": "x", "dataset": "qasper", "answers": ["y"]}], "neither 'input' nor 'question'"),
        ("papers2", [{"dataset": "qasper", "input": "x", "answers": ["y"]}], "no 'context'"),
        ("papers2", [], "no records"),
    ],
)
def test_unusable_data_is_refused(
    data: Path, tokenizer: Any, name: str, records: list[dict[str, Any]] | None, message: str
) -> None:
    if records is not None:
        write(data / f"{name}.jsonl", *records)
    with pytest.raises(CrushError, match=message):
        load_tasks([name], TaskSource(data), tokenizer)


def test_a_damaged_line_costs_itself_alone(data: Path, tokenizer: Any) -> None:
    write(data / "cut.jsonl", record(0), json.dumps(record(1))[:40], "[]", record(2))
    with pytest.warns(UserWarning, match="crushkv") as warned:
        task = load_tasks(["cut"], TaskSource(data), tokenizer)["cut"]
    messages = [str(w.message) for w in warned if "crushkv" in str(w.message)]
    assert any("cut.jsonl:2" in m for m in messages) and any("cut.jsonl:3" in m for m in messages)
    assert [p.id for p in prompts(task, "cut")] == ["r0", "r2"]


def test_unknown_tasks_name_the_nearest(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="qasper"):
        load_tasks(["qaspr"], TaskSource(), tokenizer)
    with pytest.raises(ConfigError, match="retrieval_single_2k"):
        load_tasks(["retrieval_singel_2k"], TaskSource(), tokenizer)
    with pytest.raises(ConfigError, match="no such folder"):
        load_tasks(["qasper"], TaskSource(tmp_path / "none"), tokenizer)


def test_spaces_at_the_end_of_a_prompt_can_be_cut_off(data: Path, tokenizer: Any) -> None:
    dialogue = record(0, dataset="samsum", input="Dialogue: A: hello\nSummary: ", answers=["A says hello."])
    write(data / "chats.jsonl", dialogue, {**dialogue, "_id": "x", "input": "Answer:\n"})
    task = load_tasks(["chats"], TaskSource(data), tokenizer)["chats"]
    (plain, _), (trimmed, line) = prompts(task, "chats"), prompts(task, "chats", trim=True)
    assert plain.text.endswith("Summary: ") and plain.gold == "A says hello." and not plain.trimmed
    assert trimmed.text == plain.text[:-1] and trimmed.gold == " A says hello." and trimmed.trimmed
    assert line.text.endswith("Answer:\n") and not line.trimmed


# Retrieval


@pytest.mark.parametrize("kind", list(retrieval.KINDS))
def test_retrieval_prompts_hide_what_they_ask(kind: str, tokenizer: Any) -> None:
    sentences = retrieval.haystack_sentences(None)
    for seed in range(5):
        made = retrieval.make_prompt(kind, 1900, tokenizer, sentences, random.Random(seed))
        tokens = len(tokenizer(made["prompt"]).input_ids)
        assert 1900 - 400 < tokens <= 1900
        text = made["prompt"]
        assert made == retrieval.make_prompt(kind, 1900, tokenizer, sentences, random.Random(seed))
        assert retrieval.score_contained(made, [" and ".join(made["answers"]).lower()]) == {"score": 1}
        assert retrieval.score_contained(made, ["nothing"]) == {"score": 0}
        if kind == "pairs":
            key = text.rsplit("key ", 1)[1].split(":")[0]
            assert f"key {key}: value {made['answers'][0]}\n" in text
        elif kind == "variables":
            chain = made["answers"]
            value = text.rsplit("that have the value ", 1)[1].split()[0]
            places = [text.index(f"VAR {chain[0]} = {value}.")]
            places += [text.index(f"VAR {b} = VAR {a}.") for a, b in itertools.pairwise(chain)]
            assert places == sorted(places)
        else:
            key = text.split("secret number")[-1].split("for ")[1].split()[0]
            for answer in made["answers"]:
                assert f"The secret number for {key} is {answer}." in text
    different = retrieval.make_prompt(kind, 1900, tokenizer, sentences, random.Random(99))
    assert different["prompt"] != text


def test_a_haystack_may_be_any_text(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "hay.txt").write_text("Hay is dry. Straw is drier! Is it?", encoding="utf-8")
    assert retrieval.haystack_sentences(tmp_path) == ("Hay is dry.", "Straw is drier!", "Is it?")
    source = TaskSource(haystack=tmp_path / "hay.txt", seed=3)
    task = load_tasks(["retrieval_single_1k"], source, tokenizer)["retrieval_single_1k"]
    first = next(iter(prompts(task, "retrieval_single_1k")))
    assert first.text.count("Straw is drier!") > 5 and first.score(first.gold or "") == 1
    with pytest.raises(ConfigError, match="no such file"):
        retrieval.haystack_sentences(tmp_path / "none.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no text"):
        retrieval.haystack_sentences(tmp_path / "empty")


# Fidelity


def _plain_fidelity(model: Any, ids: torch.Tensor, config: CrushConfig, gold: torch.Tensor) -> tuple[float, ...]:
    """The same figures, a token at a time and with `generate`'s own answer."""
    length = ids.shape[1]
    answer = model.generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=False)[0, length:]

    def follow(tokens: torch.Tensor, crushed: bool) -> torch.Tensor:
        cache: Any = KVCrush(config).cache(model) if crushed else None
        output = model(input_ids=ids, past_key_values=cache, use_cache=True)
        rows = [output.logits[0, -1]]
        for token in tokens[:-1]:
            output = model(input_ids=token.view(1, 1), past_key_values=output.past_key_values)
            rows.append(output.logits[0, -1])
        return torch.stack(rows).log_softmax(-1)

    with torch.no_grad():
        full, given = follow(answer, False)[1:], follow(answer, True)[1:]
        nll = -follow(gold, True).gather(1, gold[:, None]).mean()
    kl = (full.exp() * (full - given)).sum(-1).mean()
    return float(kl), float((full.argmax(-1) == given.argmax(-1)).float().mean()), float(nll)


@pytest.mark.parametrize("policy", ["h2o", "snapkv"])
def test_fidelity_equals_its_plain_computation(policy: str, subject: Subject) -> None:
    model: Any = subject.model
    ids = torch.randint(0, 256, (1, 200), generator=torch.Generator().manual_seed(1))
    gold = torch.randint(0, 256, (7,), generator=torch.Generator().manual_seed(2))
    recording = Recording(model, ids)
    reference = Reference(model, recording, gold, tokens=12)
    assert (reference.fidelity.kl, reference.fidelity.agreement, reference.fidelity.answer_tokens) == (0, 1, 11)
    for budget in (0.5, 0.2):
        config = CrushConfig(policy=policy, budget=budget, **SMALL)
        cache = recording.branch(config)
        assert isinstance(cache, CrushCache)
        found = reference.compare(cache)
        kl, agreement, nll = _plain_fidelity(model, ids, config, gold)
        assert found.kl == pytest.approx(kl, rel=1e-3, abs=1e-5) and kl > 1e-3
        assert found.agreement == pytest.approx(agreement)
        assert found.gold_nll == pytest.approx(nll, rel=1e-4)
    whole = recording.branch(CrushConfig(policy=policy, budget=1.0, **SMALL))
    assert isinstance(whole, CrushCache)
    same = reference.compare(whole)
    assert same.kl < 1e-6 and same.agreement == 1


def test_answers_decoded_together_are_those_of_generate(subject: Subject) -> None:
    model: Any = subject.model
    ids = torch.randint(0, 256, (1, 200), generator=torch.Generator().manual_seed(3))
    recording = Recording(model, ids)
    config = CrushConfig(budget=0.3, **SMALL)
    with KVCrush(config)(model):
        tokens = model.generate(ids, max_new_tokens=20, do_sample=False)[0, 200:]
    expected = subject.tokenizer.decode(tokens, skip_special_tokens=True)
    (answer,) = greedy_answers(recording, subject.tokenizer, recording.branch(config), 1, Ending(20))
    assert answer == expected
    end = expected[5]
    cut = greedy_answers(recording, subject.tokenizer, recording.branch(config), 1, Ending(20, (end,)))
    assert cut == [expected.split(end)[0]]


# Sweeps and results


def sweep(**changes: Any) -> Sweep:
    fields = {
        "tasks": ["papers"],
        "configurations": ["full", "snapkv:budget={0.5,0.25},sink=2,window=8,page_size={1,4},representative_share=0.2"],
        "measures": ["fidelity", "score"],
        "answer_tokens": 6,
        "max_new_tokens": 8,
    }
    return Sweep.from_dict({**fields, **changes})


def run(plan: Sweep, subject: Subject, data: Path, path: Path, stop_after: int | None = None) -> int:
    """Runs what is left; returns how many samples were measured now."""
    count = 0
    with ResultsFile(path, subject.description, subject.versions) as results:

        def add(sample: Sample) -> None:
            nonlocal count
            if count == stop_after:
                raise KeyboardInterrupt
            results.add(sample)
            count += 1

        for item in plan_work(plan, subject, TaskSource(data), results).items:
            run_item(item, plan, subject, add)
    return count


def _figures(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {(line["id"], line["name"]): line for line in lines}


def test_an_interrupted_sweep_goes_on_where_it_was(subject: Subject, data: Path, tmp_path: Path) -> None:
    plan = sweep()
    assert run(plan, subject, data, tmp_path / "whole.jsonl") == 4 * 5
    part = tmp_path / "part.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run(plan, subject, data, part, stop_after=7)
    # Killed in the middle of a line.
    whole_lines = part.read_bytes()
    part.write_bytes(whole_lines[:-30])
    with pytest.warns(UserWarning, match=r"part\.jsonl:7: damaged or truncated"):
        assert run(plan, subject, data, part) == 20 - 6
    with pytest.warns(UserWarning, match=r"part\.jsonl:7"):
        assert run(plan, subject, data, part) == 0
    lines = part.read_bytes().splitlines()
    part.write_bytes(b"\n".join(lines[:6] + lines[7:]) + b"\n")
    assert _figures(part) == _figures(tmp_path / "whole.jsonl")
    # Another configuration adds only itself.
    more = sweep(configurations=["full", "h2o:sink=2,window=8"])
    assert run(more, subject, data, part) == 4


def test_a_sample_tells_everything(subject: Subject, data: Path, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    run(sweep(limit=1), subject, data, path)
    samples = read_samples([path])
    full = next(sample for sample in samples if sample.config is None)
    assert full.bytes_fraction == 1 and full.kl == 0 and full.agreement == 1 and full.answer is not None
    task = load_tasks(["papers"], TaskSource(data), subject.tokenizer)["papers"]
    prompt = next(prompts(task, "papers"))
    for sample in samples:
        assert sample.settings == {
            "seed": 0,
            "chat": False,
            "measures": ["fidelity", "score"],
            "answer_tokens": 6,
            "max_new_tokens": 8,
        }
        if sample.config is not None:
            config = CrushConfig.from_dict(sample.config)
            assert config.interval == 0
            # Exactly what the direct way holds, to the byte.
            cache = KVCrush(config).cache(subject.model)
            with torch.no_grad():
                ids = subject.tokenizer(prompt.text, return_tensors="pt").input_ids
                subject.model(input_ids=ids, past_key_values=cache)
            assert (sample.bytes_held, sample.prompt_tokens) == (cache.nbytes_at_16_bits, ids.shape[1])
            assert sample.kl is not None and sample.kl > 0


def test_other_versions_are_not_mixed(subject: Subject, data: Path, tmp_path: Path) -> None:
    path, other = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    run(sweep(limit=1), subject, data, path)
    newer = replace(subject, versions={"crushkv": "1"})
    with pytest.raises(DataError, match="crushkv 0.*crushkv 1"):
        run(sweep(limit=1), newer, data, path)
    run(sweep(limit=1), newer, data, other)
    with pytest.raises(DataError, match="do not belong in one report"):
        read_report_samples([path, other])


def test_two_models_stand_in_one_report_under_their_names(subject: Subject, data: Path, tmp_path: Path) -> None:
    path, other = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    run(sweep(limit=1), subject, data, path)
    second = replace(subject, description={**subject.description, "name": "others"})
    with pytest.raises(DataError, match="give another file"):
        run(sweep(limit=1), second, data, path)
    run(sweep(limit=1), second, data, other)
    samples = read_report_samples([path, other, path])
    apart = by_model(samples)
    assert list(apart) == ["bytes", "others"] and len(apart["bytes"]) == len(apart["others"]) == len(samples) // 2
    # One name for two models would mix them.
    write(other, *(json.dumps({**json.loads(line), "model": {"name": "bytes", "dtype": "bfloat16"}})
                   for line in other.read_text(encoding="utf-8").splitlines()))  # fmt: skip
    with pytest.raises(DataError, match="do not belong in one report"):
        read_report_samples([path, other])


def test_one_name_is_one_configuration(subject: Subject, data: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    run(sweep(limit=1), subject, data, path)
    lines = path.read_text(encoding="utf-8").splitlines()
    changed = json.loads(lines[1])
    changed["config"]["sink"] = 3
    write(path, *lines, changed)
    with pytest.raises(DataError, match="two different configurations"):
        read_report_samples([path])


def test_what_is_no_result_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl:1: no sample"):
        read_report_samples([write(tmp_path / "a.jsonl", record(0))])
    with pytest.raises(DataError, match="no samples"):
        read_report_samples([write(tmp_path / "b.jsonl")])
    with pytest.raises(DataError, match="none"):
        read_report_samples([tmp_path / "none.jsonl"])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_keeps_what_was_finished(subject: Subject, data: Path, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    run(sweep(limit=1), subject, data, path)
    before = path.read_bytes()
    sample = read_samples([path])[0]
    with ResultsFile(path, subject.description, subject.versions) as results:
        results._file.close()
        results._file = Path("/dev/full").open("ab", buffering=0)  # noqa: SIM115  (a disk without room)
        with pytest.raises(DataError, match=r"No space left.*5 samples before are kept"):
            results.add(replace(sample, id="new"))
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"configurations": []}, "at least one"),
        ({"tasks": []}, "at least one"),
        ({"task": ["x"]}, "tasks"),
        ({"measures": ["fidelty"]}, "fidelity"),
        ({"limit": 0}, "limit=0"),
        ({"answer_tokens": 1}, "at least 2"),
        ({"chat": "yes"}, "chat='yes'"),
        ({"configurations": ["snapkv:bugdet=1"]}, "budget"),
        ({"configurations": [3]}, "list of names"),
    ],
)
def test_a_sweep_is_checked_before_it_runs(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sweep(**changes)


def test_a_sweep_file(tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text("tasks: [qasper]\nconfigurations: [full, 'snapkv:budget={0.5,0.25}']\nlimit: 3\n", encoding="utf-8")
    plan = Sweep.load(path, {"limit": 2})
    assert list(plan.configurations) == ["full", "snapkv:budget=0.5", "snapkv:budget=0.25"] and plan.limit == 2
    for text, message in (("tasks: [", "sweep"), ("- a", "mapping"), ("tasks: [a]\nconfigurations: [nope]", "nope")):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError, match=message):
            Sweep.load(path)
    with pytest.raises(ConfigError, match="No such file"):
        Sweep.load(tmp_path / "none.yaml")


def test_tasks_take_turns(subject: Subject, data: Path) -> None:
    """So that an interrupted sweep has measured something of each."""
    plan = sweep(tasks=["papers", "retrieval_single_1k"], limit=3)
    work = plan_work(plan, subject, TaskSource(data), None)
    assert [item.prompt.task for item in work.items] == ["papers", "retrieval_single_1k"] * 3


def test_prompts_out_of_bounds_are_counted(subject: Subject, data: Path) -> None:
    write(data / "papers.jsonl", record(0), record(1, context="x" * 9000), record(2, context="short"))
    work = plan_work(sweep(min_prompt_tokens=900), subject, TaskSource(data), None)
    assert [item.prompt.id for item in work.items] == ["r0"] and work.skipped == {"papers": 2}
    with pytest.raises(ConfigError, match="no prompt"):
        plan_work(sweep(min_prompt_tokens=4000), subject, TaskSource(data), None)


# The harness's model


@pytest.fixture(scope="module")
def harness() -> Callable[..., Any]:
    from crushkv.evaluation.harness import CrushLM

    return CrushLM


@pytest.mark.filterwarnings("ignore")
def test_likelihoods_at_a_full_budget_are_the_harness_own(subject: Subject, harness: Any) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    context = record(3)["context"]
    pairs = [(context, " red"), (context, " blue"), ("", "Item"), ("short", " one two three"), ("x" * 5000, " y")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    options = {"tokenizer": subject.tokenizer, "batch_size": 1}
    own = HFLM(subject.model, **options).loglikelihood(requests, disable_tqdm=True)
    ours = harness(subject.model, budget=1.0, **options).loglikelihood(requests, disable_tqdm=True)
    for (a, greedy_a), (b, greedy_b) in zip(own, ours, strict=True):
        assert b == pytest.approx(a, rel=1e-4) and greedy_a == greedy_b
    crushed = harness(subject.model, budget="0.2", min_tokens="0", sink="2", window="8", page_size="1", **options)
    assert crushed.crush_config == CrushConfig(budget=0.2, min_tokens=0, sink=2, window=8, page_size=1)
    less = crushed.loglikelihood(requests, disable_tqdm=True)
    assert less[0][0] != pytest.approx(own[0][0], rel=1e-4)
    with pytest.raises(CrushError, match="rolling"):
        crushed.loglikelihood_rolling(requests)


@pytest.mark.filterwarnings("ignore")
def test_any_task_of_the_harness_runs(subject: Subject, harness: Any, data: Path) -> None:
    import lm_eval

    config = CrushConfig(budget=0.3, **SMALL)
    task = load_tasks(["papers"], TaskSource(data), subject.tokenizer)["papers"]
    model = harness(subject.model, config=config, tokenizer=subject.tokenizer, batch_size=2)
    results = lm_eval.simple_evaluate(model, tasks=[task], limit=3, gen_kwargs="max_gen_toks=8")
    samples = results["samples"]["papers"]
    assert len(samples) == 3
    plan = sweep(configurations=["readahead:budget=0.3,sink=2,window=8,page_size=4,representative_share=0.2"], limit=3)
    answers = {}
    for item in plan_work(plan, subject, TaskSource(data), None).items:
        run_item(item, plan, subject, lambda sample: answers.__setitem__(sample.id, (sample.answer, sample.score)))
    for sample in samples:
        assert (sample["resps"][0][0], sample["score"]) == answers[sample["doc"]["id"]]
