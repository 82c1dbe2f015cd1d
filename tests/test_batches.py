"""Rows and batches, against the published code's (golden values) and against separate rows; the plan, by counting."""

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN, load, relative, training_record, write_lines
from safetensors.torch import load_file

from data import IGNORED, ImageFolder, Record, StepLoader, TrainingSet, collate, encode, shared_rows
from decoder import WholeRows
from plumbing.distributed import World
from tokenizer import IMAGE, TEMPLATES

RECORDS = GOLDEN / "training" / "records.json"
HELLO = [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Yes."}]  # a conversation without an image
TRAINING = [path.stem for path in sorted((GOLDEN / "training").glob("*.safetensors"))]


def training_set(family="libra-7b", files=(RECORDS,), **changes) -> TrainingSet:
    libra = load(family)
    images = ImageFolder(GOLDEN / "images", replace(libra.pixels, pad="black"))
    settings = dict(template=TEMPLATES[libra.template], image_positions=4, max_length=2048) | changes
    return TrainingSet(files, images, tokenizer=libra.tokenizer, **settings)


def golden(name):
    """(family, what the published code computes for three records)"""
    return name.rsplit("-", 1)[0], load_file(GOLDEN / "training" / f"{name}.safetensors")


@pytest.mark.parametrize("name", TRAINING)
def test_golden_ids_labels_and_pixels(name):
    family, expected = golden(name)
    records = training_set(family)
    for number in range(3):
        row, real = records.row([number]), expected["attention_mask"][number].bool()
        assert row.ids == expected["input_ids"][number][real].tolist()
        if (family, number) != ("libra-3b", 1):  # where the published code learns nothing
            assert row.labels == expected["labels"][number][real].tolist()
        assert len(row.pixels) == [2, 1, 1][number]
        assert (row.pixels.expand(2, -1, -1, -1) - expected["images"][:, number]).abs().max() < 1e-6


@pytest.mark.parametrize("name", TRAINING)
def test_golden_batch_but_for_the_positions_of_the_image(name):
    family, expected = golden(name)
    rows = [training_set(family).row([number]) for number in range(3)]
    one, four = collate(rows, 1), collate(rows, 4)
    real = expected["attention_mask"].bool()
    assert (one.segments == real.long() - 1).all()
    assert (one.ids[real] == expected["input_ids"][real]).all()
    assert (one.positions[real] == torch.arange(real.shape[1]).expand(3, -1)[real]).all()
    assert (one.labels[~real] == IGNORED).all()
    # with four positions for an image, it is the same but for three more of them
    assert ((four.ids == IMAGE).sum(1) == 4).all()
    for row in range(3):
        ids = four.ids[row].tolist()
        first = [i for i in range(len(ids)) if not (i and ids[i - 1] == ids[i] == IMAGE)]
        for values, more in zip(one[:3], four[:3], strict=True):
            assert (values[row] == more[row, first]).all()


def loss_of(libra, batch, embed_images):
    """The sum of the losses of all labels, by the mask that the batch's segments define."""
    embeddings = libra.decoder.embed_tokens(batch.ids.clamp(0))
    images = [embed_images(pixels) for pixels in batch.pixels if pixels is not None]
    if images:
        embeddings = embeddings.masked_scatter((batch.ids == IMAGE)[..., None], torch.cat(images))
    attend = WholeRows(libra.decoder.config, batch.segments)
    hidden = libra.decoder(embeddings, batch.positions, attend)
    logits = libra.decoder.head(hidden, libra.decoder.config.vocab_size)
    labels = batch.labels[:, 1:].flatten()
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels, ignore_index=IGNORED, reduction="sum")


@pytest.mark.parametrize(("name", "numbers"), [("libra-7b-align", [0, 1, 2]), ("libra-3b-align", [0, 2])])
def test_golden_loss_of_a_batch(name, numbers):
    family, expected = golden(name)
    libra = load(family)
    batch = training_set(family, image_positions=libra.image_positions).batch([[number] for number in numbers])
    with torch.inference_mode():
        loss = loss_of(libra, batch, libra.embed_images) / (batch.labels != IGNORED).sum()
    assert relative(loss, expected["loss"]) < 1e-5


TURNS = [("<image>\nIs there an effusion?", "No."), ("And now?", "A 2.5 cm one.\nIt has grown."), ("Sure?", "Yes.")]


@pytest.mark.parametrize("image", ["<image>\n", ""], ids=["image", "text"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_every_answer_of_every_template_is_learnt_with_its_end(template, image):
    tokenizer, template = load("libra-3b").tokenizer, TEMPLATES[template]
    turns = [(f"{image}Is there an effusion?", "No."), *TURNS[1:]]
    row = encode(Record("1", [], turns), template, tokenizer, 2048)
    runs = itertools.groupby(row.labels, key=lambda label: label != IGNORED)
    learnt = [tokenizer.backend.decode(list(run), skip_special_tokens=False) for is_learnt, run in runs if is_learnt]
    answers = [answer + template.end for _, answer in turns]
    if template.drops_question:  # the answers follow each other
        answers = ["".join(answers)]
    assert [text.strip() for text in learnt] == [text.strip() for text in answers]
    assert all(label in (IGNORED, id) for id, label in zip(row.ids, row.labels, strict=True))


@pytest.mark.parametrize("family", ["libra-7b", "libra-3b"])
@pytest.mark.parametrize("template", ["libra_v1", "libra_llama_3", "plain", "conv_gemma"])
def test_a_long_record_is_cut_behind_the_last_label_that_fits(family, template):
    encoded = lambda limit: encode(Record("1", [], TURNS), TEMPLATES[template], load(family).tokenizer, limit)
    whole = encoded(10**6)
    assert encoded(len(whole.ids)) == whole
    for limit in range(1, len(whole.ids)):
        fitting = [length for length in range(1, limit + 1) if whole.labels[length - 1] != IGNORED]
        length = max(fitting, default=0)
        assert encoded(limit) == (whole.ids[:length], whole.labels[:length], [0] * length, None)


def test_a_record_that_is_cut_to_nothing_takes_no_row(tmp_path):
    whole, cut, nothing = ("Why?", "No."), ("Why?", "It has grown. " * 9), ("Has it? " * 40, "No.")
    path = write_lines(tmp_path / "records.jsonl", [training_record(*texts) for texts in (whole, cut, nothing)])
    batch = training_set(files=[path], max_length=60, image_positions=1).batch([[0], [1], [2]])
    assert batch.ids.shape == (2, 60) and len(batch.pixels) == 2
    assert (batch.labels != IGNORED).any(1).all()


def test_an_image_that_is_cut_off_is_not_opened(tmp_path):
    later = [*HELLO, {"from": "human", "value": "And <image> here?"}, {"from": "gpt", "value": "No."}]
    lines = [training_record(image=[], conversations=HELLO), training_record(conversations=later)]
    path = write_lines(tmp_path / "records.jsonl", lines)
    records = training_set(files=[path])
    text, late = records.row([0]), records.row([1])
    assert text.pixels is None and IMAGE not in text.ids
    assert len(late.pixels) == 1 and late.ids.count(IMAGE) == 1
    cut = training_set(files=[path], max_length=late.ids.index(IMAGE)).row([1])
    assert cut == text
    assert [pixels is None for pixels in records.batch([[0], [1]]).pixels] == [True, False]


def test_a_batch_without_rows_has_no_loss_and_gradients_of_zero():
    libra, empty = load("libra-7b"), collate([], 4)
    assert (empty.labels == IGNORED).all() and (empty.segments == -1).all()
    weight = libra.decoder.layers[0].mlp.up_proj.weight.requires_grad_(True)
    loss = loss_of(libra, empty, libra.embed_images)
    (gradient,) = torch.autograd.grad(loss, [weight])
    weight.requires_grad_(False)
    assert float(loss.detach()) == 0 and not gradient.any()


def shared(tmp_path, family, most):
    """Six records about two image pairs: a batch of separate rows, a batch of shared rows, and the latter's sizes."""
    texts = [("Has it grown?", "It has."), ("Is there a pneumothorax?", "No."), ("Effusion?", "A small one. " * 5)]
    records = [training_record(*text, image) for text in texts for image in (["0.png", "1.png"], ["2.png"])]
    path = write_lines(tmp_path / "records.jsonl", records)
    records = training_set(family, [path], image_positions=load(family).image_positions)
    rows = shared_rows(records.prefixes, most)
    return records.batch([[number] for number in range(6)]), records.batch(rows), [len(row) for row in rows]


@pytest.mark.parametrize("family", ["libra-7b", "libra-3b"])
@pytest.mark.parametrize(("most", "expected"), [(2, [2, 1, 2, 1]), (9, [3, 3])])
def test_rows_that_share_a_prefix_have_the_loss_and_gradients_of_separate_rows(tmp_path, family, most, expected):
    libra, (separate, joined, sizes) = load(family), shared(tmp_path, family, most)
    assert sizes == expected
    results = []
    for batch in (separate, joined):
        images = {}

        def embed(pixels, images=images):
            key = pixels.numpy().tobytes()
            if key not in images:
                images[key] = libra.embed_images(pixels).requires_grad_()
            return images[key]

        loss = loss_of(libra, batch, embed)
        results.append([loss.detach(), *torch.autograd.grad(loss, images.values())])
    assert all(relative(one, other) < 1e-5 for one, other in zip(*results, strict=True))


def sights(batch):
    """Every learnt place of a batch, with all (id, position) that it sees."""
    for row in zip(*(values.tolist() for values in batch[:4]), strict=True):
        places = list(zip(*row, strict=True))
        for i, (_, label, segment, position) in enumerate(places):
            if label != IGNORED:
                yield label, position, tuple((id, at) for id, _, other, at in places[: i + 1] if other in (0, segment))


def test_in_a_shared_row_each_record_sees_what_it_sees_alone(tmp_path):
    separate, joined, _ = shared(tmp_path, "libra-7b", 9)
    assert sorted(sights(separate)) == sorted(sights(joined))


def test_only_records_with_the_same_images_in_their_first_turn_share(tmp_path):
    later = HELLO + training_record()["conversations"]
    first = [training_record(), training_record(image=["1.png"]), training_record(conversations=later)]
    second = [training_record(), training_record(image=["0.png", "1.png"]), training_record(image=["0.png", "0.png"])]
    files = [write_lines(tmp_path / "a", first), write_lines(tmp_path / "b", second)]
    records = training_set(files=files)
    assert shared_rows(records.prefixes, 2) == [[0, 3], [5], [1], [2], [4]]
    # the first id behind the image is learnt there, so there is no prefix to share
    plain = training_set(files=files, template=TEMPLATES["plain"])
    loader = StepLoader(plain, World(), **SETTINGS | dict(batch_size=6, max_shared=2))
    assert sorted(loader.rows) == [[0], [1], [2], [3], [4], [5]]


SETTINGS = dict(batch_size=10, micro_batch=2, max_shared=1, epochs=2.0, max_steps=0, seed=0)


@pytest.fixture
def records(tmp_path):
    """53 and 50 records of two files; one in seven has its answer behind what max_length leaves."""
    short = training_record(image=[], conversations=HELLO)
    long = training_record(image=[], conversations=[{"from": "human", "value": "Hi? " * 99}, HELLO[1]])
    lines = [long if number % 7 == 0 else short for number in range(103)]
    files = [write_lines(tmp_path / "a", lines[:53]), write_lines(tmp_path / "b", lines[53:])]
    return training_set(files=files, max_length=100)


def test_the_order_depends_on_seed_and_epoch_alone(tmp_path):
    path = write_lines(tmp_path / "records.jsonl", [training_record(image=[], conversations=HELLO)] * 12)
    settings = SETTINGS | dict(batch_size=1)
    plan = lambda seed: StepLoader(training_set(files=[path]), World(), **settings | dict(seed=seed)).plan(0)
    order = lambda seed: [number for (((number,),),) in plan(seed)]
    assert order(3)[12:] == [1, 3, 9, 5, 6, 0, 8, 10, 11, 7, 2, 4]  # in every version, so that a run resumes
    assert sorted(order(3)[:12]) == list(range(12))
    assert order(3)[:12] != order(3)[12:] and order(3) != order(4)


@pytest.mark.parametrize("ranks", range(1, 6))
def test_ranks_share_each_step_and_each_epoch_has_every_record_once(records, ranks):
    loaders = [StepLoader(records, World(rank, ranks), **SETTINGS) for rank in range(ranks)]
    plans = [list(loader.plan(0)) for loader in loaders]
    assert all(len(rows) <= 2 for plan in plans for passes in plan for rows in passes)
    steps = [[list(itertools.chain(*passes)) for passes in step] for step in zip(*plans, strict=True)]
    assert all(max(map(len, shares)) - min(map(len, shares)) <= 1 for shares in steps)
    for epoch in (steps[:11], steps[11:]):
        rows = itertools.chain(*itertools.chain(*epoch))
        assert sorted(itertools.chain(*rows)) == list(range(103))
    # a run resumes at any step
    assert [list(loaders[-1].plan(first)) for first in range(22)] == [plans[-1][first:] for first in range(22)]


@pytest.mark.parametrize("ranks", range(1, 6))
def test_even_ranks_run_as_many_forward_passes(records, ranks):
    loaders = [StepLoader(records, World(rank, ranks), even=True, **SETTINGS) for rank in range(ranks)]
    uneven = [StepLoader(records, World(rank, ranks), **SETTINGS) for rank in range(ranks)]
    learning = lambda batches: [batch.numbers for batch in batches if (batch.labels != IGNORED).any()]
    for steps in zip(*(loader.batches(0) for loader in loaders + uneven), strict=True):
        batches = [batches for _, batches in steps]
        assert len({len(passes) for passes in batches[:ranks]}) == 1
        # and they learn the same from them
        assert list(map(learning, batches[:ranks])) == list(map(learning, batches[ranks:]))


def test_rows_of_similar_length_go_together(records):
    for passes in StepLoader(records, World(), **SETTINGS | dict(batch_size=40, micro_batch=8)).plan(0):
        sizes = [len(records.row(row).ids) for row in itertools.chain(*passes)]
        sizes = [size for size in sizes if size]  # 0: max_length leaves nothing of a long question
        assert sizes == sorted(sizes)


def test_worker_processes_load_the_same_batches():
    settings = SETTINGS | dict(batch_size=2)
    alone, helped = (StepLoader(training_set(), World(), workers=workers, **settings) for workers in (0, 2))
    for (_, (one,)), (_, (other,)) in zip(alone.batches(0), helped.batches(0), strict=True):
        assert one.numbers == other.numbers
        tensors, others = [*one[:4], *one.pixels], [*other[:4], *other.pixels]
        assert all(itertools.starmap(torch.equal, zip(tensors, others, strict=True)))


def test_an_image_that_breaks_in_training_is_one_line(tmp_path):
    (tmp_path / "0.png").write_bytes((GOLDEN / "images" / "0.png").read_bytes()[:200])
    records = training_set(files=[write_lines(tmp_path / "records.jsonl", [training_record()])])
    records.images = ImageFolder(tmp_path, records.images.config)
    with pytest.raises(ValueError, match=r"0\.png is a damaged") as error:
        next(StepLoader(records, World(), **SETTINGS | dict(batch_size=1)).batches(0))
    assert "\n" not in str(error.value)
