"""Writing shares, assembling a manifest, reading tensors back; and what a flipped or lost byte does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from orchestrator.errors import CheckpointDamagedError, StorageError, UsageError
from orchestrator.storage.assemble import assemble
from orchestrator.storage.digest import crc32c
from orchestrator.storage.local import LocalStore
from orchestrator.storage.manifest import parse_manifest
from orchestrator.storage.segment import layout
from orchestrator.storage.shards import _TORCH_NAMES, dtype_name, read_tensors, torch_dtype, write_shard
from orchestrator.storage.verify import check_manifest, verify

from .helpers import HEAD, head, save, write_shards


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "run")


def test_a_share_opens_with_the_safetensors_library_alone(store: LocalStore) -> None:
    for shard in write_shards(store):
        json.dumps(shard)
    directory = store.root / "checkpoints/step-000000120-a0003-abc"
    assert sorted(path.name for path in directory.iterdir()) == ["rank-00000.safetensors", "rank-00001.safetensors"]
    first, second = (load_file(path) for path in sorted(directory.iterdir()))
    assert first["model.fc.weight[0:1,0:3]"].tolist() == [[0.0, 1.0, 2.0]]
    assert first["model.fc.bias"].tolist() == [0.5, -0.5]
    assert second["model.fc.weight[1:2,0:3]"].tolist() == [[3.0, 4.0, 5.0]]
    assert second["scheduler.count"].item() == 7


def test_reported_digests_are_those_of_the_bytes_on_disk(store: LocalStore) -> None:
    for shard in write_shards(store):
        data = (store.root / shard["file"]["path"]).read_bytes()
        assert (shard["file"]["bytes"], shard["file"]["crc32c"]) == (len(data), f"{crc32c(data):08x}")
        for tensor in shard["tensors"]:
            assert tensor["crc32c"] == f"{crc32c(data[tensor['begin'] : tensor['end']]):08x}"


def test_digests_across_block_borders(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.storage.shards.BLOCK_BYTES", 7)
    test_reported_digests_are_those_of_the_bytes_on_disk(store)


def test_whole_tensors_come_back(store: LocalStore) -> None:
    _, manifest = save(store)
    tensors = read_tensors(store, manifest)
    assert sorted(tensors) == ["model.fc.bias", "model.fc.weight", "scheduler.count"]
    assert torch.equal(tensors["model.fc.weight"], torch.arange(6.0).view(2, 3))
    assert tensors["scheduler.count"].shape == () and tensors["scheduler.count"].item() == 7


@pytest.mark.parametrize(
    ("offset", "size", "expected"),
    [
        ((0, 0), (1, 3), [[0.0, 1.0, 2.0]]),
        ((1, 1), (1, 2), [[4.0, 5.0]]),
        ((0, 1), (2, 1), [[1.0], [4.0]]),
        ((1, 0), (0, 3), []),
    ],
)
def test_boxes_come_back(
    store: LocalStore, offset: tuple[int, int], size: tuple[int, int], expected: list[list[float]]
) -> None:
    _, manifest = save(store)
    assert read_tensors(store, manifest, {"model.fc.weight": (offset, size)})["model.fc.weight"].tolist() == expected


def test_given_tensors_are_filled(store: LocalStore) -> None:
    _, manifest = save(store)
    bias = torch.zeros(2, requires_grad=True)
    read = read_tensors(store, manifest, {"model.fc.bias": None}, {"model.fc.bias": bias})
    assert read["model.fc.bias"] is bias and bias.tolist() == [0.5, -0.5]
    with pytest.raises(UsageError, match=r"'model.fc.bias' is stored as torch.float32 \(2,\), asked for as .* \(3,\)"):
        read_tensors(store, manifest, None, {"model.fc.bias": torch.zeros(3)})


def test_what_is_not_there_is_refused(store: LocalStore) -> None:
    _, manifest = save(store)
    with pytest.raises(UsageError, match="step 120 has no tensor 'model.fc9'"):
        read_tensors(store, manifest, {"model.fc9": None})
    with pytest.raises(UsageError, match="lies outside 'model.fc.bias'"):
        read_tensors(store, manifest, {"model.fc.bias": ((1,), (2,))})


def test_every_flipped_bit_and_every_truncation_is_noticed(store: LocalStore) -> None:
    record, manifest = save(store)
    for file in (*manifest.files,):
        path = store.root / manifest.path_of(file.path)
        sound = path.read_bytes()
        for place in range(len(sound)):
            path.write_bytes(sound[:place] + bytes([sound[place] ^ 0x10]) + sound[place + 1 :])
            with pytest.raises(CheckpointDamagedError, match=file.path):
                verify(store, record)
        for length in (0, 1, len(sound) - 1):
            path.write_bytes(sound[:length])
            with pytest.raises(CheckpointDamagedError, match=f"{file.path} is {length} bytes long"):
                check_manifest(store, record)
        path.write_bytes(sound)
    verify(store, record)


def test_damaged_bytes_never_reach_the_given_tensors(store: LocalStore) -> None:
    _, manifest = save(store)
    chunk = manifest.tensors["scheduler.count"].chunks[0]
    path = store.root / manifest.path_of(chunk.file)
    data = bytearray(path.read_bytes())
    data[chunk.begin] ^= 1
    path.write_bytes(data)
    given = {"model.fc.bias": torch.zeros(2), "scheduler.count": torch.tensor(1)}
    with pytest.raises(CheckpointDamagedError, match=r"rank-00001.safetensors is damaged: tensor 'scheduler.count'"):
        read_tensors(store, manifest, None, given)
    assert given["model.fc.bias"].tolist() == [0.0, 0.0] and given["scheduler.count"].item() == 1


def test_the_damaged_tensor_is_named(store: LocalStore) -> None:
    record, manifest = save(store)
    chunk = manifest.tensors["model.fc.bias"].chunks[0]
    path = store.root / manifest.path_of(chunk.file)
    data = bytearray(path.read_bytes())
    data[chunk.end - 1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointDamagedError, match="tensor 'model.fc.bias' is affected"):
        verify(store, record)


def test_a_save_without_all_its_shares_is_refused(store: LocalStore) -> None:
    first, second = write_shards(store)
    with pytest.raises(CheckpointDamagedError, match="'model.fc.weight' is not whole: its chunks hold 3 of 6"):
        assemble([first], run="train", reason="periodic", created=0.0)
    second["tensors"] = [item for item in second["tensors"] if item["name"] != "scheduler.count"]
    with pytest.raises(CheckpointDamagedError, match="'scheduler.count' is in no file"):
        assemble([first, second], run="train", reason="periodic", created=0.0)
    with pytest.raises(StorageError, match="Shards of different saves"):
        assemble([first, {**second, "step": 121}], run="train", reason="periodic", created=0.0)
    with pytest.raises(StorageError, match="without any shard"):
        assemble([], run="train", reason="periodic", created=0.0)


def test_replicas_that_two_survivors_wrote_are_taken_once(store: LocalStore) -> None:
    table, size = layout([("model.w", "U8", (3,))])
    more = {"tracked": {"model": {"$tensor": "model.w"}}}
    shards = [
        write_shard(store, f"checkpoints/c/rank-{rank}", head(5, rank, **more), table, memoryview(b"abc"))
        for rank in (1, 0)
    ]
    manifest = assemble(shards, run="train", reason="exception", created=0.0)
    assert [chunk.file for chunk in manifest.tensors["model.w"].chunks] == ["rank-0"]
    assert len(manifest.files) == 2 and size == 3


def test_per_rank_state_is_collected_from_all_ranks(store: LocalStore) -> None:
    shards = write_shards(store)
    for rank, shard in enumerate(shards):
        shard["head"]["per_rank"] = {str(rank): {"reader": {"at": rank}}}
    state = assemble(shards, run="train", reason="periodic", created=0.0).state
    assert state["per_rank"] == {"0": {"reader": {"at": 0}}, "1": {"reader": {"at": 1}}}


def test_a_manifest_survives_its_json(store: LocalStore) -> None:
    _, manifest = save(store)
    again = parse_manifest(manifest.to_bytes(), manifest.directory)
    assert again == manifest and again.state["user"] == HEAD["user"]


def test_a_table_with_holes_or_past_the_segment_is_refused(store: LocalStore) -> None:
    table, _ = layout([("a", "U8", (3,)), ("b", "U8", (3,))])
    with pytest.raises(StorageError, match="'b' lies at 3..6, not at 0"):
        write_shard(store, "x/y", head(1, 0), table[1:], memoryview(b"abcdef"))
    with pytest.raises(StorageError, match="needs 6 bytes, the segment holds 5"):
        write_shard(store, "x/y", head(1, 0), table, memoryview(b"abcde"))
    assert store.list("") == []


@pytest.mark.parametrize("name", sorted(_TORCH_NAMES))
def test_every_dtype_round_trips_bit_for_bit(store: LocalStore, name: str) -> None:
    dtype = torch_dtype(name)
    assert dtype_name(dtype) == name
    raw = torch.arange(48, dtype=torch.uint8) % 2 if name == "BOOL" else torch.arange(48, dtype=torch.uint8)
    tensor = raw.view(dtype).view(2, -1)
    table, size = layout([("t", name, tuple(tensor.shape)), ("none", name, (0, 3))])
    shard = write_shard(store, "checkpoints/c/f", head(1, 0, tracked={}), table, memoryview(bytes(raw.tolist())))
    manifest = assemble([shard], run="r", reason="periodic", created=0.0)
    read = read_tensors(store, manifest)
    assert size == 48 and read["none"].shape == (0, 3)
    assert read["t"].dtype == dtype and torch.equal(read["t"].view(torch.uint8), tensor.view(torch.uint8))


def test_large_tensors_are_read_in_parallel_and_in_place(store: LocalStore) -> None:
    tensors = {f"t{i}": torch.randn(700_000 + i) for i in range(4)} | {f"s{i}": torch.randn(i + 1) for i in range(9)}
    table, size = layout([(name, "F32", tuple(tensor.shape)) for name, tensor in tensors.items()])
    data = b"".join(tensors[entry.name].numpy().tobytes() for entry in table)
    shard = write_shard(store, "checkpoints/c/f", head(1, 0, tracked={}), table, memoryview(bytearray(data)))
    read = read_tensors(store, assemble([shard], run="r", reason="periodic", created=0.0))
    assert len(data) == size and all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
