"""Jobs with pictures from end to end, and the models, records and adapters that they refuse."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import weft
from tests.pictures import job_values, model_folder, write_records
from weft import Job
from weft.audit.canaries import audit_run
from weft.core.errors import JobError, PolicyError
from weft.export import export
from weft.prepare import prepare, set_up
from weft.site import processor

FAMILIES = ("vit", "clip")


@pytest.fixture(params=FAMILIES)
def values(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    return job_values(tmp_path, request.param)


@pytest.fixture
def vit(tmp_path: Path) -> dict[str, Any]:
    return job_values(tmp_path, "vit")


@pytest.fixture
def clip(tmp_path: Path) -> dict[str, Any]:
    return job_values(tmp_path, "clip")


def outputs(net: Any, reader: Any, folder: Path) -> torch.Tensor:
    """Return what a model says of one picture, and of one caption where it reads any."""
    given = {"pixel_values": reader.pixels(str(folder / "0.png"))[None]}
    if reader.tokenizer is not None:
        given |= dict(reader.tokenizer(["red 0"], return_tensors="pt"))
        given.pop("token_type_ids", None)
    with torch.no_grad():
        found = net.eval()(**given)
    return torch.cat([found.logits] if "logits" in found else [found.image_embeds, found.text_embeds])


def test_a_whole_run(values: dict[str, Any], tmp_path: Path) -> None:
    """It learns; plain peft and the merged model give the site's own outputs; no pretrained weight is in the file."""
    from peft import PeftModel

    run = weft.run(Job(**values), tmp_path / "run")
    methods = run.results["methods"]
    assert methods["federated"]["overall"]["loss"] < 0.9 * methods["untrained"]["overall"]["loss"]
    assert (run.folder / "report.html").stat().st_size > 10_000

    config = json.loads((run.folder / "adapter" / "adapter_config.json").read_bytes())
    assert config["task_type"] is None
    headed = values["task"] == "image_classification"
    assert config["modules_to_save"] == (["classifier"] if headed else None)
    assert any("classifier" in name for name in run.adapter()) == headed
    assert all(".lora_" in name or "classifier" in name for name in run.adapter())

    base, reader = run.base()
    plain = PeftModel.from_pretrained(base, run.folder / "adapter")
    expected = outputs(plain, reader, tmp_path)
    bench = set_up(prepare(run.job))
    trained = weft.store.Store(run.folder, run.job.hash()).latest()[0].state["adapter"]
    with bench.loaded.holding(trained) as net:
        assert torch.allclose(outputs(net, bench.loaded.tokenizer, tmp_path), expected, atol=1e-5)
    merged = type(base).from_pretrained(export(run, tmp_path / "merged", merge=True))
    assert torch.allclose(outputs(merged, reader, tmp_path), expected, atol=1e-4)
    assert (tmp_path / "merged" / "preprocessor_config.json").is_file()


def _bytes(run: weft.Run) -> bytes:
    return (run.folder / "adapter" / "adapter_model.safetensors").read_bytes()


def test_a_stopped_run_ends_in_the_same_bytes(values: dict[str, Any], tmp_path: Path) -> None:
    """Stopped after the first of two rounds; clients keep their moments on disk."""
    values["local"]["moments"] = "keep"
    whole = weft.run(Job(**values), tmp_path / "whole")

    class Stop(weft.watch.Watch):
        def round(self, method: str, number: int, row: dict[str, Any]) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        weft.run(Job(**values), tmp_path / "run", watch=Stop())
    assert _bytes(weft.run(Job(**values), tmp_path / "run", resume=True)) == _bytes(whole)


@pytest.mark.parametrize("adapter", ["lora", "ia3", "bottleneck", "bitfit", "full"])
def test_the_payload_is_what_is_trained_and_no_more(values: dict[str, Any], adapter: str) -> None:
    """The state that travels names every trainable parameter, the new head's among them, and never the scale."""
    values["adapter"] = adapter
    loaded = set_up(prepare(Job(**values))).loaded
    trainable = {name for name, p in loaded.net.named_parameters() if p.requires_grad}
    assert set(loaded.initial) == trainable
    assert not any("logit_scale" in name for name in trainable)
    headed = values["task"] == "image_classification"
    assert any(name.endswith("classifier.bias") or "classifier.modules_to_save" in name for name in trainable) == headed
    if adapter == "full":
        assert len(trainable) == len(list(loaded.net.parameters())) - (0 if headed else 1)


def test_both_towers_are_adapted(clip: dict[str, Any]) -> None:
    loaded = set_up(prepare(Job(**clip))).loaded
    for tower in ("vision_model", "text_model", "visual_projection", "text_projection"):
        assert any(f".{tower}." in name for name in loaded.initial), tower


def test_another_image_processor_is_another_base(vit: dict[str, Any], tmp_path: Path) -> None:
    shutil.copytree(vit["model"]["name"], tmp_path / "model")
    vit["model"]["name"] = "model"
    weft.run(Job(**vit), tmp_path / "run")
    path = tmp_path / "model" / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_mean": [0.4, 0.5, 0.5]}))
    with pytest.raises(PolicyError, match="the base model or its vocabulary changed"):
        weft.run(Job(**vit), tmp_path / "run", resume=True)


def test_another_picture_of_the_same_name_is_other_data(vit: dict[str, Any], tmp_path: Path) -> None:
    weft.run(Job(**vit), tmp_path / "run")
    shutil.copy(tmp_path / "1.png", tmp_path / "0.png")
    with pytest.raises(PolicyError, match="the training data changed since this run began"):
        weft.run(Job(**vit), tmp_path / "run", resume=True)


def test_pictures_are_read_once_and_as_transformers_does(vit: dict[str, Any], tmp_path: Path, monkeypatch: Any) -> None:
    """Preprocessing happens before training, once a picture; by hand: (pixel / 255 - 0.5) / 0.5 for the ViT."""
    made: list[str] = []
    pixels = processor.Processor.pixels

    def counted(self: Any, path: str) -> torch.Tensor:
        made.append(path)
        return pixels(self, path)

    monkeypatch.setattr(processor.Processor, "pixels", counted)
    bench = set_up(prepare(Job(**vit)))
    assert len(made) == 22 + 8
    first = bench.train["site-0"].examples[0]["pixels"]
    assert first[:, 0, 0].tolist() == pytest.approx([(c / 255 - 0.5) / 0.5 for c in (230, 30, 30)], abs=1e-6)


# --- refusals


def refusal(values: dict[str, Any]) -> str:
    with pytest.raises(JobError) as caught:
        set_up(prepare(Job(**values)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("adapter", ["prompt", "ptuning", "prefix"])
def test_virtual_tokens_are_refused_before_a_model_is_loaded(values: dict[str, Any], adapter: str) -> None:
    values["adapter"] = adapter
    with pytest.raises(JobError, match="virtual tokens in front of a text, and this task gives the model pictures"):
        prepare(Job(**values))


def copied(values: dict[str, Any], tmp_path: Path) -> Path:
    shutil.copytree(values["model"]["name"], tmp_path / "model")
    values["model"]["name"] = "model"
    return tmp_path / "model"


def changed(path: Path, **keys: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def test_a_folder_without_an_image_processor(values: dict[str, Any], tmp_path: Path) -> None:
    (copied(values, tmp_path) / "preprocessor_config.json").unlink()
    assert "model has no image processor (preprocessor_config.json); copy the whole model" in refusal(values)


def test_an_image_processor_that_cannot_be_read(vit: dict[str, Any], tmp_path: Path) -> None:
    folder = copied(vit, tmp_path)
    (folder / "preprocessor_config.json").write_text("{")
    assert "the image processor of model cannot be read" in refusal(vit)


def test_an_image_processor_of_another_model(values: dict[str, Any], tmp_path: Path) -> None:
    large = {"height": 16, "width": 16}
    changed(copied(values, tmp_path) / "preprocessor_config.json", size=large, crop_size=large)
    assert "makes pictures of 16 x 16 pixels and its config.json asks for 8 x 8" in refusal(values)


def test_an_image_processor_that_leaves_sizes_as_they_are(vit: dict[str, Any], tmp_path: Path) -> None:
    changed(copied(vit, tmp_path) / "preprocessor_config.json", do_resize=False)
    assert "leaves pictures of unlike sizes as they are" in refusal(vit)


def test_image_text_needs_two_towers(clip: dict[str, Any], tmp_path: Path) -> None:
    folder = copied(clip, tmp_path)
    for path in model_folder("vit").iterdir():
        if "processor" not in path.name:
            shutil.copy(path, folder)
    assert "is a vit model; image_text needs a tower for pictures and one for captions" in refusal(clip)


def test_a_tokenizer_that_ends_captions_otherwise(clip: dict[str, Any], tmp_path: Path) -> None:
    """The model would read every caption at its first token, and all alike."""
    folder = copied(clip, tmp_path)
    text = json.loads((folder / "config.json").read_text())
    changed(folder / "config.json", text_config=text["text_config"] | {"eos_token_id": 50})
    assert "reads a caption at its end token 50, and its tokenizer ends captions otherwise" in refusal(clip)


def test_a_batch_of_one_compares_nothing(clip: dict[str, Any]) -> None:
    clip["local"]["batch"] = 1
    assert refusal(clip) == "local.batch: image_text compares the records of a batch with each other; set at least 2"


def test_no_pair_has_a_loss_of_its_own_to_hide(clip: dict[str, Any]) -> None:
    clip["local"]["dp"] = {"clip": 1.0, "noise": 1.0}
    assert "the loss of image_text compares the records of a batch" in refusal(clip)


def test_no_pair_is_a_canary(clip: dict[str, Any], tmp_path: Path) -> None:
    """One pair alone has nothing to be told from: its loss is 0 before and after."""
    run = weft.run(Job(**clip), tmp_path / "run")
    with pytest.raises(JobError, match="image_text compares records with each other; a canary has no loss"):
        audit_run(run)


def test_privacy_of_pictures(vit: dict[str, Any], tmp_path: Path) -> None:
    """Pictures have no tokens to sort by; what is spent of privacy stands in the results."""
    vit["local"]["dp"] = {"clip": 1.0, "noise": 1.0}
    vit["privacy"] = {"delta": 1e-3}
    run = weft.run(Job(**vit), tmp_path / "run")
    assert run.results["privacy"]
    assert all(tensor.isfinite().all() for tensor in run.adapter().values())


def test_a_client_of_one_record_compares_nothing(clip: dict[str, Any], tmp_path: Path) -> None:
    write_records(tmp_path, "train.jsonl", 4)
    assert "client site-1 has a single record" in refusal(clip)


def test_captions_longer_than_the_model_reads(clip: dict[str, Any]) -> None:
    clip["task"] = {"image_text": {"max_length": 500}}
    assert "task.image_text.max_length: 500 is more than the model's 128 positions" in refusal(clip)


def test_zero_shot_labels_are_asked_for(clip: dict[str, Any], tmp_path: Path) -> None:
    clip["task"] = {"image_text": {"max_length": 20, "classes": ["red", "green", "blue", "yellow"]}}
    run = weft.run(Job(**clip), tmp_path / "run")
    assert 0 <= run.results["methods"]["federated"]["overall"]["accuracy"] <= 1
    clip["task"] = {"image_text": {"max_length": 20}}
    clip["evaluate"] = {"on": ["accuracy"]}
    assert "evaluate.on[0]: image_text has no metric `accuracy`" in refusal(clip)


def test_a_picture_that_is_damaged_later(vit: dict[str, Any], tmp_path: Path) -> None:
    """Found when the records are read, before a model is loaded."""
    (tmp_path / "3.png").write_bytes((tmp_path / "3.png").read_bytes()[:40])
    with pytest.raises(JobError, match=r"train.jsonl:4: the picture is damaged"):
        prepare(Job(**vit))
