"""Versions of a model, wherever they lie: what was planted is found, and what cannot be compared is named."""

from __future__ import annotations

import functools
import json
import shutil
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from rlpost import cli
from rlpost.analysis import stored
from rlpost.analysis.adapter import MergedAdapter
from rlpost.analysis.measure import WeightRow, analyze
from rlpost.analysis.stored import open_version, open_versions
from rlpost.archive import VERSIONS, VersionArchive
from rlpost.core.patch import diff
from rlpost.core.weights import bits
from rlpost.engines.lora_layers import LoraSpec
from rlpost.engines.plain_learner import PlainLearner
from rlpost.engines.pretrained import StoredTensors, save_pretrained
from rlpost.types import WeightImage
from tests.engines.learner_jobs import SPEC, stir

EMBEDDING, HEAD, Q = "model.embed_tokens.weight", "lm_head.weight", "model.layers.3.self_attn.q_proj.weight"


def weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    tensors = {EMBEDDING: torch.randn(12, 10), Q: torch.randn(20, 10), "model.norm.weight": torch.ones(10)}
    return {name: tensor.bfloat16() for name, tensor in tensors.items()}


def save(path: Path, tensors: Mapping[str, Tensor]) -> Path:
    path.mkdir(parents=True)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path / "model.safetensors")
    return path


def rows_of(before: object, after: object, **options: Any) -> dict[str, WeightRow]:
    (update,) = analyze(str(before), [str(after)], **options).updates
    return {row.name: row for row in update.rows}


def notes_of(before: object, after: object) -> str:
    return "\n".join(analyze(str(before), [str(after)]).updates[0].notes)


@pytest.fixture
def planted(tmp_path: Path) -> tuple[Path, Path]:
    """Three entries of row 4 of q change."""
    after = weights()
    after[Q][4, :3] += 1
    return save(tmp_path / "before", weights()), save(tmp_path / "after", after)


# -- where a version may lie -------------------------------------------------------------------------------------------


def sharded(model: Path, path: Path) -> Path:
    path.mkdir()
    tensors = load_file(model / "model.safetensors")
    places = {name: f"model-{number}.safetensors" for number, name in enumerate(tensors)}
    for name, file in places.items():
        save_file({name: tensors[name]}, path / file)
    save_file(
        {"layers.0.wq": torch.zeros(2)}, path / "consolidated.safetensors"
    )  # not listed: another copy of the weights
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return path


def exported(model: Path, run: Path) -> Path:
    """A run that has exported two stages, and was moved since."""
    for stage, source in {"first": model.parent / "before", "second": model}.items():
        shutil.copytree(source, run / "exports" / stage)
    events = [
        {"event": "export", "stage": stage, "path": f"/elsewhere/exports/{stage}"} for stage in ("first", "second")
    ]
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return run


def archived(model: Path, run: Path) -> str:
    archive = VersionArchive(run / VERSIONS)
    before, after = (
        WeightImage(version=number, tensors=load_file(path / "model.safetensors"))
        for number, path in enumerate((model.parent / "before", model))
    )
    archive.append(diff(None, before))
    archive.append(diff(before, after))
    return f"{run}@1"


PLACES: dict[str, Callable[[Path, Path], object]] = {
    "directory": lambda model, _: model,
    "file": lambda model, _: model / "model.safetensors",
    "shards": sharded,
    "index": lambda model, path: sharded(model, path) / "model.safetensors.index.json",
    "run": exported,
    "archive": archived,
}


@pytest.mark.parametrize("kind", PLACES)
def test_a_planted_update_is_found_wherever_its_versions_lie(
    kind: str, planted: tuple[Path, Path], tmp_path: Path
) -> None:
    before, after = planted
    where = PLACES[kind](after, tmp_path / "place")
    rows = rows_of(before, where)
    assert {name: row.sparsity.numel - row.sparsity.bit_equal for name, row in rows.items()} == {
        EMBEDDING: 0,
        Q: 3,
        "model.norm.weight": 0,
    }
    assert rows == rows_of(before, after)
    assert list(rows_of(where, after).values()) == list(rows_of(after, after).values())


def test_a_name_on_the_hub_is_read_from_this_machines_cache(
    planted: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two revisions there, as the hub's own library lays them out."""
    before, after = planted
    repository = tmp_path / "cache" / "models--org--name"
    (repository / "refs").mkdir(parents=True)
    for commit, branch, model in (("a" * 40, "main", before), ("b" * 40, "tuned", after)):
        shutil.copytree(model, repository / "snapshots" / commit)
        (repository / "refs" / branch).write_text(commit)
    cached = functools.partial(huggingface_hub.snapshot_download, cache_dir=tmp_path / "cache", local_files_only=True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", cached)
    assert rows_of("org/name", "org/name@tuned") == rows_of(before, after)
    with pytest.raises(ValueError, match=r"^org/other is not on this machine, .*could not be downloaded .* network"):
        open_version("org/other")


def test_of_the_hub_only_weights_and_tables_are_asked_for(
    planted: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(planted[0])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    open_version("org/name@v1.0")
    assert (asked["name"], asked["revision"]) == ("org/name", "v1.0")
    files = ["config.json", "m-1.safetensors", "m.bin", "README.md", "onnx/m.safetensors", "consolidated.safetensors"]
    patterns = {key: asked[key] for key in ("allow_patterns", "ignore_patterns")}
    assert list(filter_repo_objects(files, **patterns)) == ["config.json", "m-1.safetensors"]


def test_a_place_that_holds_no_version_is_named_with_the_remedy(planted: tuple[Path, Path], tmp_path: Path) -> None:
    before, _ = planted
    run = tmp_path / "run"
    run.mkdir()
    (run / "events.jsonl").write_text('{"event": "run_start"}\n')
    (tmp_path / "model.bin").write_bytes(b"x")
    (tmp_path / "bad.safetensors.index.json").write_text("{}")
    cases = {
        "nowhere": "nowhere is not there: give a model directory",
        "nowhere@3": "nowhere@3 is not there: .*RUN@N",
        "run@masters": "run has no checkpoint, where master weights are",
        "run": "run has not exported a model yet: .*run@N",
        "run@3": "does not hold version 3: it is empty",
        "model.bin": r"model.bin is no \*.safetensors",
        "bad.safetensors.index.json": "has no weight_map",
    }
    for name, message in cases.items():
        with pytest.raises(ValueError, match=message):
            open_version(str(tmp_path / name))
    broken = sharded(before, tmp_path / "broken")
    shard = broken / "model-1.safetensors"
    save_file({"other": torch.zeros(2)}, shard)
    with pytest.raises(ValueError, match=r"model-1.safetensors lacks .*, which the index lists"):
        open_version(str(broken))
    shard.write_bytes(shard.read_bytes()[:-3])
    with pytest.raises(ValueError, match=r"model-1.safetensors is missing or damaged"):
        open_version(str(broken))


# -- what versions of one model may differ in --------------------------------------------------------------------------


@pytest.mark.parametrize("stored_in", ["before", "after"])
def test_an_output_layer_that_is_the_embedding_counts_once_wherever_it_is_stored(
    stored_in: str, planted: tuple[Path, Path], tmp_path: Path
) -> None:
    places = {path.name: path for path in planted}
    tensors = load_file(places[stored_in] / "model.safetensors")
    places[stored_in] = save(tmp_path / "copy", tensors | {HEAD: tensors[EMBEDDING]})
    assert rows_of(places["before"], places["after"]) == rows_of(*planted)
    assert f"{HEAD} is the embedding in all of them" in notes_of(places["before"], places["after"])


@pytest.mark.parametrize("swapped", [False, True])
def test_an_output_layer_that_left_the_embedding_is_compared_with_it(
    swapped: bool, planted: tuple[Path, Path], tmp_path: Path
) -> None:
    tensors = load_file(planted[1] / "model.safetensors")
    head = tensors[EMBEDDING].clone()
    head[7] = 0
    untied = save(tmp_path / "untied", tensors | {HEAD: head})
    places = (untied, planted[0]) if swapped else (planted[0], untied)
    rows = rows_of(*places)
    assert rows[HEAD].sparsity.bit_equal == 120 - 10 and rows[EMBEDDING].sparsity.bit_equal == 120
    assert rows[Q].sparsity.bit_equal == 197
    assert f"{HEAD} is stored only in one of the two" in notes_of(*places)
    first, second = analyze(str(planted[0]), [str(planted[1]), str(untied)]).updates
    assert "in both" in "".join(first.notes) and "only in one" in "".join(second.notes)


def test_vocabularies_of_different_sizes_are_compared_in_the_rows_they_share(
    planted: tuple[Path, Path], tmp_path: Path
) -> None:
    before, after = planted
    tensors = load_file(after / "model.safetensors")
    wider = torch.cat([tensors[EMBEDDING], torch.ones(4, 10).bfloat16()])
    wider[2, 3] += 1
    resized = save(tmp_path / "resized", tensors | {EMBEDDING: wider})
    for places in ((before, resized), (resized, before)):
        row = rows_of(*places)[EMBEDDING]
        assert (row.shape, row.sparsity.bit_equal) == ((12, 10), 119)
        assert f"{EMBEDDING}: only the first 12 rows are compared" in notes_of(*places)
    assert open_versions([str(before), str(resized)]).shape(EMBEDDING) == (12, 10)
    narrower = save(tmp_path / "narrower", tensors | {EMBEDDING: tensors[EMBEDDING][:, :8]})
    with pytest.raises(ValueError, match=r"embed_tokens.*\(12, 10\) in .*before and \(12, 8\) in .*narrower"):
        rows_of(before, narrower)


def test_a_weight_that_only_one_has_is_named_with_what_it_may_be_called(
    planted: tuple[Path, Path], tmp_path: Path
) -> None:
    bare = {name.removeprefix("model."): tensor for name, tensor in weights().items()}
    with pytest.raises(
        ValueError, match=r"^embed_tokens.weight is only in .*bare \(6 such .*/before is model.embed_tokens"
    ):
        rows_of(planted[0], save(tmp_path / "bare", bare))
    renamed = {name.replace("q_proj", "query_proj"): tensor for name, tensor in weights().items()}
    with pytest.raises(ValueError, match=r"q_proj.weight is only in .*before .*/renamed is .*query_proj.weight"):
        rows_of(planted[0], save(tmp_path / "renamed", renamed))


def test_the_command_says_what_is_not_compared_as_it_stands(
    planted: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = load_file(planted[1] / "model.safetensors")
    after = save(tmp_path / "after-all", tensors | {HEAD: tensors[EMBEDDING]})
    out = tmp_path / "figures.json"
    assert cli.main(["analyze", str(planted[0]), str(after), "-o", str(out)]) == 0
    note = f"{HEAD} is the embedding in all of them, and counts once"
    assert note in capsys.readouterr().out.replace("\n", " ")
    assert json.loads(out.read_text())["updates"][str(after)]["notes"] == [note]


def test_integer_buffers_are_left_out_and_quantized_weights_refused(planted: tuple[Path, Path], tmp_path: Path) -> None:
    positions = {"model.position_ids": torch.arange(5), "model.mask": torch.ones(3, dtype=torch.bool)}
    after = save(tmp_path / "buffers", load_file(planted[1] / "model.safetensors") | positions)
    assert rows_of(planted[0], after) == rows_of(*planted)
    assert notes_of(planted[0], after) == "not compared, as they hold integers: model.mask and 1 more"
    for dtype in (torch.int8, torch.float8_e4m3fn):
        quantized = save(tmp_path / str(dtype), weights() | {Q: torch.ones(20, 10).to(dtype)})
        with pytest.raises(ValueError, match=rf"{Q} is {dtype} in .*: quantized".replace("torch.", "")):
            rows_of(planted[0], quantized, dtype=torch.float32)


# -- LoRA --------------------------------------------------------------------------------------------------------------

LLAMA: dict[str, Any] = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": LLAMA,
    "rslora": LLAMA | {"use_rslora": True},
    "patterns": LLAMA | {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {r"layers\.1\.mlp\.down_proj": 1}},
    "fan_in_fan_out": {"r": 3, "lora_alpha": 6, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_an_adapter_is_the_model_that_peft_merges(name: str, tiny_model: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    if name == "fan_in_fan_out":
        model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50, n_positions=8))
    base, settings = tmp_path / "base", SETTINGS[name]
    model.save_pretrained(str(base))
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    torch.manual_seed(1)
    for key, parameter in adapted.named_parameters():
        if ".lora_" in key:
            nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(str(tmp_path / "adapter"))
    merged = adapted.merge_and_unload().state_dict()

    versions = open_versions([str(base), str(tmp_path / "adapter")])
    changed = set()
    for weight in versions.names:
        before, after = versions.tensors(weight)
        assert torch.equal(bits(after), bits(merged[weight].contiguous())), weight
        if not torch.equal(before, after):
            changed.add(weight)
    targets = settings["target_modules"]
    assert changed == {n for n in versions.names if n.split(".")[-2] in targets and n.endswith(".weight")} != set()
    for weight, row in rows_of(base, tmp_path / "adapter", spectra=True).items():
        rank = settings.get("rank_pattern", {}).get(weight.split(".")[-2], 3) if weight in changed else 0
        assert row.spectrum is None or row.spectrum.ranks.numerical == rank
    assert rows_of(base, tmp_path / "adapter" / "adapter_model.safetensors") == rows_of(base, tmp_path / "adapter")


def test_an_exported_adapter_over_its_base_is_the_exported_model(tiny_model: Path, tmp_path: Path) -> None:
    """To the bit, in float32, though the base is stored in bfloat16."""
    learner = PlainLearner(tiny_model, serve_dtype=torch.float32, lora=LoraSpec(rank=4, alpha=8.0, rslora=True))
    learner.begin_stage(SPEC)
    stir(learner)
    save_pretrained(learner.weights(), tiny_model, tmp_path / "export", learner.adapter())
    versions = open_versions(
        [str(tiny_model), str(tmp_path / "export"), str(tmp_path / "export" / "adapter")], dtype=torch.float32
    )
    assert any("q_proj" in name for name in versions.names)
    for name in versions.names:
        base, export, merged = versions.tensors(name)
        assert torch.equal(export, merged)
        assert torch.equal(base, merged) != ("_proj." in name)


def adapter(path: Path, *, without: str = "", tensors: Mapping[str, Tensor] | None = None, **config: Any) -> Path:
    """Of rank 2 for q, by hand: B A is 1 in row 4, and s = 2."""
    path.mkdir()
    A_RN, B_MR = torch.zeros(2, 10), torch.zeros(20, 2)
    A_RN[1], B_MR[4, 1] = 1, 1
    module = f"base_model.model.{Q.removesuffix('.weight')}"
    found = {f"{module}.lora_A.weight": A_RN, f"{module}.lora_B.weight": B_MR, **(tensors or {})}
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none", "init_lora_weights": True, **config}
    (path / "adapter_config.json").write_text(json.dumps({k: v for k, v in settings.items() if k != without}))
    save_file({n: t for n, t in found.items() if not without or without not in n}, path / "adapter_model.safetensors")
    return path


def test_a_merged_weight_is_rounded_once(tmp_path: Path) -> None:
    """To the base's dtype, or straight to the one asked for: 256 + 1.5 is between the bfloat16 numbers 256 and 258."""
    tensors = weights() | {Q: torch.full((20, 10), 256.0).bfloat16()}
    base, tuned = save(tmp_path / "base", tensors), adapter(tmp_path / "adapter", alpha_pattern={"q_proj": 3})
    assert open_versions([str(base), str(tuned)]).tensors(Q)[1][4].tolist() == [258.0] * 10
    (_, after) = open_versions([str(base), str(tuned)], dtype=torch.float32).tensors(Q)
    assert after.dtype == torch.float32 and after[4].tolist() == [257.5] * 10 and after[5].tolist() == [256.0] * 10


def test_an_adapter_applies_to_any_version(planted: tuple[Path, Path], tmp_path: Path) -> None:
    tuned = adapter(tmp_path / "adapter")
    expected = rows_of(planted[0], tuned)
    assert expected[Q].sparsity.bit_equal == 190
    assert rows_of(archived(planted[1], tmp_path / "run").replace("@1", "@0"), tuned) == expected


MODULE = "base_model.model.model.layers.3"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "adapter_config.json: peft_type = 'IA3' is no LoRA: merge it with peft"),
        ({"use_dora": True}, "an adapter with use_dora = True is more than a LoRA on its base: merge it"),
        ({"modules_to_save": ["lm_head"]}, r"an adapter with modules_to_save = \['lm_head'\] is more"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa' is more than a LoRA on its base"),
        ({"bias": "all"}, "bias = 'all' is more"),
        ({"without": "lora_alpha"}, "has no lora_alpha"),
        ({"without": "lora_B"}, r"adapter lacks .*q_proj.lora_B.weight: copy"),
        ({"tensors": {f"{MODULE}.embed.lora_embedding_A": torch.ones(2)}}, "lora_embedding_A is no LoRA matrix"),
        (
            {"tensors": {f"{MODULE}.x.lora_{m}.weight": torch.ones(2, 2) for m in "AB"}},
            r"adapter adapts model.layers.3.x.weight, which .* the base",
        ),
        (
            {"tensors": {f"{MODULE}.self_attn.q_proj.lora_A.weight": torch.ones(2, 11)}},
            r"q_proj.weight is \(20, 10\) in the model before it, and B A of \(20, 2\) and \(2, 11\)",
        ),
        (
            {"tensors": {f"{MODULE}.self_attn.q_proj.lora_A.weight": torch.ones(3, 10)}},
            r"B A of \(20, 2\) and \(3, 10\)",
        ),
        ({"fan_in_fan_out": True}, r"q_proj.weight is \(20, 10\)"),
    ],
)
def test_what_is_no_plain_adapter_of_the_base_is_refused_by_name(
    changes: dict[str, Any], message: str, planted: tuple[Path, Path], tmp_path: Path
) -> None:
    tuned = adapter(tmp_path / "adapter", **changes)
    with pytest.raises(ValueError, match=message):
        rows_of(planted[0], tuned)


def test_an_adapter_is_no_model(planted: tuple[Path, Path], tmp_path: Path) -> None:
    tuned = adapter(tmp_path / "adapter")
    with pytest.raises(ValueError, match="adapter is a LoRA adapter, an update and no model"):
        rows_of(tuned, planted[0])
    (tuned / "adapter_model.safetensors").rename(tuned / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"adapter has no adapter_model.safetensors: .*safe_serialization"):
        rows_of(planted[0], tuned)


# -- memory ------------------------------------------------------------------------------------------------------------


def test_one_weight_of_each_version_is_held_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 40: those of one name, of the one before it, and what an adapter is merged from."""
    names = [f"model.layers.{number}.self_attn.q_proj.weight" for number in range(40)]
    before = save(tmp_path / "before", {name: torch.full((20, 10), 1.0) for name in names})
    after = save(tmp_path / "after", {name: torch.full((20, 10), 2.0) for name in names})
    places = [str(before), str(after), str(adapter(tmp_path / "adapter")), archived(after, tmp_path / "run")]
    alive: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()
    most, reads = 0, 0

    def watched(read: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def counted(*arguments: Any) -> Tensor:
            nonlocal most, reads
            tensor = read(*arguments)
            alive[id(tensor)] = tensor
            most, reads = max(most, len(alive)), reads + 1
            return tensor

        return counted

    monkeypatch.setattr(StoredTensors, "tensor", watched(StoredTensors.tensor))
    monkeypatch.setattr(MergedAdapter, "tensor", watched(MergedAdapter.tensor))
    monkeypatch.setattr(stored, "rebuilt_tensor", watched(stored.rebuilt_tensor))
    analyze(places[0], places[1:], spectra=True)
    assert reads > 4 * 40 and most <= 2 * len(places) + 3
