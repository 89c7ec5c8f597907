"""What a run saw is written down: the hash of its data, of their order, and how many tokens."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from study_fixture import write_study
from training_fixture import Progressions, make_run
from twofold import report
from twofold.training.order import DataOrder
from twofold.training.progress import Outcome
from twofold.training.trainer import train


def test_the_digest_is_of_the_indices_as_they_come():
    order = DataOrder(seed=3, train_size=29, batch_size=7)
    seen = np.concatenate([order.batch(number).numpy() for number in range(10)]).astype("<i8")
    assert order.digest(10) == hashlib.sha256(seen.tobytes()).hexdigest()
    assert DataOrder(seed=3, train_size=29, batch_size=7).digest(10) == order.digest(10)
    assert DataOrder(seed=3, train_size=29, batch_size=70).digest(1) == order.digest(10), (
        "cut otherwise, the same order"
    )
    others = [order.digest(9), DataOrder(seed=4, train_size=29, batch_size=7).digest(10)]
    assert order.digest(10) not in others


def test_an_outcome_holds_what_the_run_saw_and_ties_of_a_seed_share_it(tmp_path: Path):
    found = {}
    for name, tie, seed in (("a", "(Q, K, V)", 0), ("b", "(Q, K=V)", 0), ("c", "(Q, K, V)", 1)):
        run = make_run(steps=3, seed=seed, model={"tie": tie})
        outcome = train(run, tmp_path / name, task=Progressions())
        assert json.loads((tmp_path / name / "outcome.json").read_text())["data_order"] == outcome.data_order
        found[name] = (outcome.data_hash, outcome.data_order, outcome.tokens)
    assert found["a"] == found["b"]
    assert found["a"][0] == found["c"][0]
    assert found["a"][1] != found["c"][1]
    assert len(found["a"][1]) == 64


def test_an_outcome_from_before_is_read():
    before = {
        "scores": {},
        "parameters": 1,
        "seconds": 1.0,
        "tokens": 1,
        "cached_floats_per_token": 1,
        "data_hash": "d",
    }
    assert Outcome.from_dict(before).data_order == ""
    with pytest.raises(KeyError):
        Outcome.from_dict({name: value for name, value in before.items() if name != "tokens"})


def test_the_report_names_data_order_and_tokens_of_every_run(tmp_path: Path):
    folder = tmp_path / "synthetic"
    write_study(folder)
    for path in folder.glob("runs/bytes/*/*/outcome.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"data_order": f"order of {path.parent.name}"}))
    report.write(folder)
    runs = pd.read_csv(folder / "report" / "runs.csv")
    done = runs[(runs.task == "bytes") & (runs.status == "done")]
    assert (done.data_order == "order of seed-" + done.seed.astype(str)).all()
    assert done.tokens.notna().all()
    assert (done.data_hash == "d" * 64).all()
