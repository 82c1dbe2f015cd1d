import json

import pytest
from conftest import GOLDEN, load

from data import EMPTY_BATCH, IGNORED, ImageFolder, StepLoader, TrainingSet
from plumbing.distributed import World
from tokenizer import IMAGE, TEMPLATES

SETTINGS = dict(batch_size=10, micro_batch=2, max_shared=1, epochs=2.0, max_steps=0, seed=0)


@pytest.fixture
def rows(tmp_path):
    """53 and 50 records of two files; one in seven has an answer behind what max_length leaves."""
    libra = load("libra-7b")
    for name, count in (("a", 53), ("b", 50)):
        with open(tmp_path / name, "w") as file:
            for number in range(count):
                question = "Has it grown? " * (40 if number % 7 == 0 else 1)
                said = [{"from": "human", "value": question}, {"from": "gpt", "value": "It has."}]
                file.write(json.dumps({"id": f"{name}{number}", "conversations": said}) + "\n")
    images, template = ImageFolder(GOLDEN / "images", libra.pixels), TEMPLATES[libra.template]
    return TrainingSet([tmp_path / "a", tmp_path / "b"], images, libra.tokenizer, template, libra.image_positions, 100)


@pytest.mark.parametrize("count", range(1, 6))
def test_processes_share_each_step_and_resume_at_it(rows, count):
    every = [StepLoader(rows, World(rank, count), **SETTINGS) for rank in range(count)]
    assert {(steps.per_epoch, steps.num_steps) for steps in every} == {(11, 22)}
    for epoch in range(2):
        seen = []
        for step in range(11 * epoch, 11 * epoch + 11):
            shares = [[row for micro in steps.micro_batches(step) for row in micro] for steps in every]
            assert max(map(len, shares)) - min(map(len, shares)) <= 1
            assert all(len(micro) <= 2 for steps in every for micro in steps.micro_batches(step))
            seen += [number for share in shares for row in share for number in row]
        assert sorted(seen) == list(range(103))  # every record once an epoch
    ids = lambda first: [[rows.ids(micro) for micro, _ in found] for _, found in every[-1].batches(first)]
    assert ids(15) == ids(0)[15:]


@pytest.mark.parametrize("count", range(1, 6))
def test_even_processes_have_as_many_forward_passes_in_every_step(rows, count):
    every = [StepLoader(rows, World(rank, count), even=True, **SETTINGS) for rank in range(count)]
    plain = [StepLoader(rows, World(rank, count), **SETTINGS) for rank in range(count)]
    passes = [[len(found) for _, found in steps.batches(0)] for steps in every]
    assert all(found == passes[0] for found in passes)
    ids = lambda steps: [
        [rows.ids(micro) for micro, batch in found if batch is not EMPTY_BATCH] for _, found in steps.batches(0)
    ]
    assert list(map(ids, every)) == list(map(ids, plain))


def test_rows_of_about_the_same_length_go_together(rows):
    steps = StepLoader(rows, World(0, 1), **SETTINGS | dict(batch_size=40, micro_batch=8))
    for step in range(steps.num_steps):
        sizes = [len(rows[row].ids) for micro in steps.micro_batches(step) for row in micro]
        sizes = [size for size in sizes if size]  # 0: max_length leaves nothing of a long question
        assert sizes == sorted(sizes)


def test_records_of_the_same_images_share_a_row_whatever_their_files(tmp_path):
    libra, pair, other = load("libra-7b"), ["0.png", "1.png"], ["1.png", "0.png"]
    asked = {"a": [(pair, "Edema?"), (other, "Edema?"), (pair, "Nodule?")], "b": [(pair, "Effusion?"), (None, "Who?")],
             "c": [(None, "Who?"), (other, "Effusion?")]}  # fmt: skip
    for name, records in asked.items():
        with open(tmp_path / name, "w") as file:
            for number, (images, question) in enumerate(records):
                asks = "<image>\n" * bool(images) + question
                said = [{"from": "human", "value": asks}, {"from": "gpt", "value": "No."}]
                record = {"id": f"{name}{number}", "conversations": said} | ({"image": images} if images else {})
                file.write(json.dumps(record) + "\n")
    images, template = ImageFolder(GOLDEN / "images", libra.pixels), TEMPLATES[libra.template]
    files = [tmp_path / name for name in asked]
    rows = TrainingSet(files, images, libra.tokenizer, template, libra.image_positions, 100)
    steps = StepLoader(rows, World(), **SETTINGS | dict(batch_size=7, max_shared=3))
    assert [row.tolist() for row in steps.rows] == [[0, 2, 3], [1, 6], [4], [5]]
    assert rows.ids([[3, 6]]) == ["b0", "c1"] and rows.records.place(6) == f"{tmp_path / 'c'} line 2"
    text = libra.tokenizer.decode(rows[0, 2, 3].ids[rows[0, 2, 3].ids.index(IMAGE) + 1 :])
    assert [word for word in text.replace("?", " ").split() if word in ("Edema", "Nodule", "Effusion")] == [
        "Edema", "Nodule", "Effusion"
    ]  # fmt: skip


def test_nothing_has_no_loss_and_gradients_of_zero():
    libra = load("libra-7b")
    weight = libra.decoder.layers[0].mlp.up_proj.weight
    try:
        loss = libra.requires_grad_(True).loss(EMPTY_BATCH)
        loss.backward()
        assert float(loss.detach()) == 0 and weight.grad is not None and not weight.grad.any()
    finally:
        libra.requires_grad_(False).zero_grad()
    assert (EMPTY_BATCH.labels == IGNORED).all() and (EMPTY_BATCH.segments < 0).all()  # nor does it count
