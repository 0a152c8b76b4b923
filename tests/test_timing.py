"""`crushkv bench`: what is measured, how it is summed up, and what is said about it."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import pytest
import torch

from architectures import small_model
from crushkv import ConfigError, CrushConfig
from crushkv.timing import Record, Request, measure_request, read_records, repeated_prompt, summarize, write_record
from crushkv.timing.measure import measure
from crushkv.timing.plots import plot, save


def record(method: str, repeat: int, ttft: float, tpot: float, **changes: object) -> Record:
    made = Record(
        engine="crushkv",
        method=method,
        budget=None if method == "full" else 0.25,
        tokens=1000,
        batch=1,
        new_tokens=11,
        repeat=repeat,
        ttft_seconds=ttft,
        tpot_seconds=tpot,
        total_seconds=ttft + 10 * tpot,
        tokens_per_second=11 / (ttft + 10 * tpot),
        peak_memory_bytes=1000,
        peak_above_start_bytes=100,
        kv_bytes=10,
        full_kv_bytes=40,
        stages=None if method == "full" else {"signatures": 0.01, "distances": 0.02, "grouping": 0.03, "gather": 1.0},
    )
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


def test_ratios_are_those_of_one_round() -> None:
    """A machine that became three times slower from round to round changes no ratio."""
    records = [
        made
        for repeat, slower in enumerate((1.0, 3.0, 9.0))
        for made in (record("full", repeat, 2 * slower, slower), record("snapkv", repeat, 3 * slower, slower / 2))
    ]
    full, ours = summarize(records)
    assert (full.ttft_ratio, full.tpot_ratio) != (None, None)
    assert full.ttft_ratio is not None and full.ttft_ratio.low == full.ttft_ratio.high == 1
    assert ours.ttft_ratio is not None and ours.tpot_ratio is not None and ours.ttft is not None
    assert ours.ttft_ratio.median == ours.ttft_ratio.low == ours.ttft_ratio.high == 1.5
    assert ours.tpot_ratio.median == 0.5
    assert (ours.ttft.median, ours.ttft.low, ours.ttft.high) == (9, 3, 27)
    assert ours.repeats == 3


def test_the_own_share_is_that_of_three_stages() -> None:
    (ours,) = summarize([record("snapkv", 0, 5.0, 0.1)])
    assert ours.own_share == pytest.approx(0.06 / 6)
    assert ours.ttft_ratio is None, "there is no full cache to compare with"


def test_errors_and_notes_are_rows() -> None:
    failed = record("adakv", 0, 1, 1, ttft_seconds=None, tpot_seconds=None, error="batches are not supported", note="x")
    full, other = summarize([record("full", 0, 1, 1), failed])
    assert other.ttft is None and other.ttft_ratio is None and other.repeats == 0
    assert other.remarks == ("batches are not supported", "x")
    assert plot([full, other]).axes


def test_engines_are_compared_with_their_own_full_cache() -> None:
    records = [record("full", 0, 1, 1), record("full", 0, 10, 1, engine="b"), record("evict", 0, 5, 1, engine="b")]
    assert [figure.ttft_ratio and figure.ttft_ratio.median for figure in summarize(records)] == [1, 1, 0.5]


def test_records_survive_a_file(tmp_path: Path) -> None:
    made = [record("full", 0, 1, 1), record("snapkv", 1, 2, 3)]
    file = io.StringIO('{"kind": "machine", "threads": 2}\n')
    file.seek(0, io.SEEK_END)
    for one in made:
        write_record(file, one)
    path = tmp_path / "results.jsonl"
    path.write_text(file.getvalue())
    assert read_records([path]) == made
    path.write_text('{"kind": "request", "what": 1}\n')
    with pytest.raises(ConfigError, match=r"results\.jsonl', line 1"):
        read_records([path])
    with pytest.raises(ConfigError, match="none"):
        read_records([tmp_path / "none"])


@pytest.mark.parametrize("batch", [1, 3])
def test_a_request_is_measured(batch: int) -> None:
    model = small_model()
    prompt = torch.randint(1, 100, (batch, 200))
    full = measure_request(model, prompt, Request(200, batch, 5))
    config = CrushConfig(budget=0.25, min_tokens=0, sink=2, window=8, page_size=4, representative_share=0.5)
    ours = measure_request(model, prompt, Request(200, batch, 5, "snapkv", config, 2))
    assert (full.method, ours.method, ours.repeat, ours.budget) == ("full", "snapkv", 2, 0.25)
    for made in (full, ours):
        assert (made.tokens, made.batch, made.new_tokens) == (200, batch, 5)
        assert made.ttft_seconds and made.tpot_seconds and made.total_seconds and made.tokens_per_second
        assert made.total_seconds == pytest.approx(made.ttft_seconds + 4 * made.tpot_seconds)
        assert made.tokens_per_second == pytest.approx(5 * batch / made.total_seconds)
    assert full.kv_bytes == full.full_kv_bytes == ours.full_kv_bytes
    assert ours.kv_bytes and full.kv_bytes and 0.2 < ours.kv_bytes / full.kv_bytes < 0.6  # with room to grow
    assert full.stages is None
    assert ours.stages and {"importance", "signatures", "distances", "grouping", "gather"} <= ours.stages.keys()


def test_tokens_are_decoded_without_cudnn() -> None:
    """It makes a plan for each number of tokens, which would count as the full cache's time."""
    model, passes = small_model(), list[bool]()
    allowed = torch.backends.cuda.cudnn_sdp_enabled
    before = allowed()
    hook = model.register_forward_pre_hook(lambda *_: passes.append(allowed()))
    measure(model, torch.randint(1, 100, (1, 20)), max_new_tokens=4, do_sample=False)
    hook.remove()
    assert passes == [before, False, False, False]
    assert allowed() is before is True


def test_rows_of_a_prompt_differ() -> None:
    class Words:
        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": list(range(len(text.split())))}

    prompt = repeated_prompt(Words(), 5000, 4)
    assert prompt.shape == (4, 5000)
    assert len({tuple(row.tolist()) for row in prompt}) == 4


def test_plots_are_written(tmp_path: Path) -> None:
    figures = summarize(
        [
            dataclasses.replace(record(method, 0, tokens / 1000, 0.1), tokens=tokens, batch=batch)
            for method in ("full", "snapkv $x$")
            for tokens in (1000, 2000)
            for batch in (1, 4)
        ]
    )
    png, svg = save(plot(figures), tmp_path / "new")
    assert png.read_bytes()[:4] == b"\x89PNG"
    assert svg.read_text().lstrip().startswith("<?xml")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError):
        save(plot(figures), tmp_path / "file")
