"""A benchmark of Ianvs' federated example, its three files written as its documentation shows them."""

import csv
import hashlib
import json
from pathlib import Path

import pytest

from tests.conftest import EXAMPLES, WORDS
from weft.core.errors import JobError, RunError
from weft.importers.ianvs import import_ianvs
from weft.suite.run import bench
from weft.suite.suite import load_suite

JOB = """
benchmarkingjob:
  name: "benchmarkingjob"
  workspace: "./project/workspace/fedllm/"
  testenv: "./examples/federated-llm/fedllm-peft/testenv/testenv.yaml"
  test_object:
    type: "algorithms"
    algorithms:
      - name: "fedavg-lora"
        url: "./examples/federated-llm/fedllm-peft/algorithm/algorithm.yaml"
      - name: "fedavgm-ptuning"
        url: "./examples/federated-llm/fedllm-peft/algorithm/second.yaml"
  rank:
    sort_by: [ { "rouge1_metric": "descend" } ]
    visualization: { mode: "selected_only", method: "print_table" }
    selected_dataitem:
      paradigms: [ "all" ]
      modules: [ "all" ]
      hyperparameters: [ "basemodel-peft_method" ]
      metrics: [ "rouge1_metric", "rouge2_metric", "rougel_metric", "bleu4_metric" ]
    save_mode: "selected_and_all"
"""
ALGORITHM = """
algorithm:
  paradigm_type: "federatedlearning"
  fl_data_setting: { train_ratio: 1.0, splitting_method: "default", label_data_ratio: 1.0 }
  modules:
    - type: "basemodel"
      name: "fedllm-peft"
      url: "./examples/federated-llm/fedllm-peft/algorithm/model.py"
      hyperparameters:
        - batch_size: { values: [4] }
        - learning_rate: { values: [1e-4] }
        - local_epochs: { values: [1] }
        - model_name: { values: ["THUDM/chatglm-6b"] }
        - save_dir: { values: ["./project/save_model/fedllm/chatglm_lora2"] }
        - initial_model_url: { values: ["./project/init_model/fedllm/chatglm"] }
        - peft_method: { values: ["lora"] }
    - type: "aggregation"
      name: "FedAvg-PEFT"
      url: "./examples/federated-llm/fedllm-peft/algorithm/FedAvg-PEFT.py"
"""
SECOND = ALGORITHM.replace('["lora"]', '["ptuning"]').replace('"FedAvg-PEFT"', '"FedAvgM-PEFT"') + (
    "      hyperparameters: [ {beta: {values: [0.7]}}, {server_lr: {values: [1.0]}} ]\n"
)
TESTENV = """
testenv:
  backend: "TORCH"
  dataset:
    name: 'medicalQA'
    train_data: "./project/data/fedllm/medicalQA/train_sub.jsonl"
    test_data: "./project/data/fedllm/medicalQA/test_sub.jsonl"
  model_eval: { model_metric: { name: "rouge1_metric", url: "./rouge1_metric.py" } }
  metrics:
    - { name: "rouge1_metric", url: "./rouge1_metric.py" }
    - { name: "rouge2_metric", url: "./rouge2_metric.py" }
    - { name: "rougel_metric", url: "./rougel_metric.py" }
    - { name: "bleu4_metric", url: "./bleu4_metric.py" }
  round: 5
  gpu_num: 4
  client_number: 4
  if_mode_llm: true
"""
OLD = (
    "rank,algorithm,rouge1_metric,rouge2_metric,rougel_metric,bleu4_metric,paradigm,basemodel,aggregation,"
    "basemodel-batch_size,time,url\n"
    "1,fedavg-peft,0.9,0.0965,0.1907,0.0525,federatedlearning,fedllm-peft,FedAvg-PEFT,1,2025-10-01 10:00:00,./a.yaml\n"
)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a checkout of Ianvs with the example, which is also where commands run."""
    here = tmp_path / "ianvs"
    example, project = here / "examples/federated-llm/fedllm-peft", here / "project"
    files = {
        example / "benchmarkingjob.yaml": JOB,
        example / "algorithm/algorithm.yaml": ALGORITHM,
        example / "algorithm/second.yaml": SECOND,
        example / "testenv/testenv.yaml": TESTENV,
        project / "workspace/fedllm/benchmarkingjob/rank/all_rank.csv": OLD,
    }
    for name, count in (("train", 12), ("test", 4)):
        rows = [
            {"instruction": f"What is {WORDS[i % 10]}?", "output": "A disease. " * (1 + i % 2)} for i in range(count)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        files[project / f"data/fedllm/medicalQA/{name}_sub.jsonl"] = text
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf8")
    monkeypatch.chdir(here)
    return here


def _hashes(folder: Path) -> dict[str, str]:
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_benchmark_is_imported_and_every_key_is_named(root: Path, tmp_path: Path) -> None:
    """1e-4, a text to PyYAML, is a number; the first two columns are question and answer; ptuning is a prefix."""
    before = _hashes(root)
    source = root / "examples/federated-llm/fedllm-peft/benchmarkingjob.yaml"
    notes = import_ianvs(source, tmp_path / "out", model=str(EXAMPLES / "models/stories260K"))
    assert _hashes(root) == before
    first, second = load_suite(tmp_path / "out" / "suite.yaml").cells
    assert first.job.local.lr == 1e-4
    assert first.job.data.columns == {"question": "instruction", "answer": "output"}
    assert first.job.adapter.to_job()["lora"]["targets"] == ["q_proj", "k_proj", "v_proj"]
    assert second.job.adapter.to_job() == {"prefix": {"tokens": 20, "projection": False, "hidden": None}}
    assert second.job.algorithm.to_job() == {"fedavgm": {"momentum": 0.7, "lr": 1.0}}
    assert (first.job.rounds, first.job.data.split.keys["clients"]) == (5, 4)
    named = {**notes.carried, **notes.changed, **notes.left}
    for key in (
        "testenv.gpu_num", "testenv.backend", "testenv.if_mode_llm", "testenv.model_eval.model_metric.name",
        "testenv.dataset.name", "benchmarkingjob.rank.visualization.mode", "benchmarkingjob.rank.save_mode",
        "algorithm.fl_data_setting.splitting_method", "basemodel-save_dir", "basemodel-learning_rate", "testenv.round",
    ):  # fmt: skip
        assert key in named, key
    assert "save_dir" in (tmp_path / "out" / "IMPORTED.md").read_text(encoding="utf8")


def test_an_imported_benchmark_runs_and_keeps_the_old_rows(root: Path, tmp_path: Path) -> None:
    """The old row scores 0.9, more than a tiny model can: it stays, and is first."""
    source = root / "examples/federated-llm/fedllm-peft/benchmarkingjob.yaml"
    import_ianvs(source, tmp_path / "out", model=str(EXAMPLES / "models/stories260K"))
    sets = ["rounds=1", "evaluate.max_new_tokens=4", "evaluate.every=0", "task.causal_lm.max_length=48"]
    bench(tmp_path / "out" / "suite.yaml", tmp_path / "run", overrides=sets, threads=1)
    with open(tmp_path / "run" / "all_rank.csv", encoding="utf8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["rank"] for row in rows] == ["1", "2", "3"]
    assert rows[0]["rouge1_metric"] == "0.9"
    assert list(rows[0])[:11] == [*OLD.split("\n")[0].split(",")[:9], "basemodel-batch_size", "time"]
    assert {row["algorithm"] for row in rows[1:]} == {"fedavg-lora", "fedavgm-ptuning"}
    assert {row["aggregation"] for row in rows[1:]} == {"FedAvg-PEFT", "FedAvgM-PEFT"}
    scores = [float(row["rouge1_metric"]) for row in rows]
    assert scores == sorted(scores, reverse=True)
    assert (root / "project/workspace/fedllm/benchmarkingjob/rank/all_rank.csv").read_text(encoding="utf8") == OLD
    with open(tmp_path / "run" / "selected_rank.csv", encoding="utf8", newline="") as file:
        selected = list(csv.DictReader(file))
    assert "basemodel-peft_method" in selected[0]
    assert "basemodel-batch_size" not in selected[0]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"FedAvg-PEFT"', '"FedYogi-PEFT"', "FedYogi-PEFT"),
        ('["lora"]', '["adapter"]', "peft_method"),
    ],
)
def test_what_the_example_does_not_have_is_refused(root: Path, tmp_path: Path, old: str, new: str, said: str) -> None:
    file = root / "examples/federated-llm/fedllm-peft/algorithm/algorithm.yaml"
    file.write_text(file.read_text(encoding="utf8").replace(old, new), encoding="utf8")
    with pytest.raises(JobError, match=said):
        import_ianvs(root / "examples/federated-llm/fedllm-peft/benchmarkingjob.yaml", tmp_path / "out", model="x")
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_not_there_is_named(root: Path, tmp_path: Path) -> None:
    (root / "examples/federated-llm/fedllm-peft/testenv/testenv.yaml").unlink()
    with pytest.raises(JobError, match="testenv: there is no"):
        import_ianvs(root / "examples/federated-llm/fedllm-peft/benchmarkingjob.yaml", tmp_path / "out")


def test_a_suite_over_a_model_that_is_not_there_fails_cell_by_cell(root: Path, tmp_path: Path) -> None:
    """Without --model the base is ChatGLM's name on the hub, which is not at hand: each cell says so."""
    import_ianvs(root / "examples/federated-llm/fedllm-peft/benchmarkingjob.yaml", tmp_path / "out")
    sets = ["model.random=true"]
    with pytest.raises(RunError, match="2 of 2 cells failed"):
        bench(tmp_path / "out" / "suite.yaml", tmp_path / "run", overrides=sets)
