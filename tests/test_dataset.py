import dataclasses
import functools
import itertools
import json
import pickle
import random

import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN, load, relative
from PIL import Image
from safetensors.torch import load_file

import data
from attention import attention
from data import (
    IGNORED,
    Batch,
    Dataset,
    ImageFolder,
    Question,
    Record,
    Records,
    check,
    collate,
    encode,
    order,
    shared_rows,
)  # fmt: skip
from tokenizer import IMAGE, TEMPLATES

RECORDS = GOLDEN / "training" / "records.json"
TRAINING = [path.stem for path in sorted((GOLDEN / "training").glob("*.safetensors"))]


@functools.cache
def golden(name):
    return load_file(GOLDEN / "training" / f"{name}.safetensors")


def dataset(family, records=RECORDS, **settings):
    libra = load(family)
    images = ImageFolder(GOLDEN / "images", dataclasses.replace(libra.pixels, pad="black"))
    settings = {"max_length": 2048} | settings
    return Dataset(Records(records), images, libra.tokenizer, TEMPLATES[libra.template], **settings)


def write(tmp_path, *records, name="records.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def record(question="Has it grown?", answer="It has.", image="0.png", id="1", **changes):
    said = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    return {"id": id, "image": image, "conversations": said} | changes


# ------------------------------------------------------------------------------------------ golden values


@pytest.mark.parametrize("name", TRAINING)
def test_items_are_the_published_ids_labels_and_pixels(name):
    family, expected = name.rsplit("-", 1)[0], golden(name)
    for number, item in enumerate(map(dataset(family).__getitem__, range(3))):
        real = expected["attention_mask"][number].bool()
        assert item.ids == expected["input_ids"][number][real].tolist()
        if (family, number) != ("libra-3b", 1):  # where the published code learns nothing
            assert item.labels == expected["labels"][number][real].tolist()
        assert len(item.pixels) == [2, 1, 1][number]
        assert (item.pixels.expand(2, -1, -1, -1) - expected["images"][:, number]).abs().max() < 1e-6


@pytest.mark.parametrize("name", TRAINING)
def test_a_batch_is_the_published_one_but_for_the_image_s_places(name):
    items = [dataset(name.rsplit("-", 1)[0])[number] for number in range(3)]
    expected, one, four = golden(name), collate(items, 1), collate(items, 4)
    real = expected["attention_mask"].bool()
    assert (one.segments == real.long() - 1).all()
    assert (one.ids[real] == expected["input_ids"][real]).all()
    assert (one.positions[real] == torch.arange(real.shape[1]).expand(3, -1)[real]).all()
    assert (one.labels[~real] == IGNORED).all()
    assert ((four.ids == IMAGE).sum(1) == 4).all() and four.ids.shape[1] == one.ids.shape[1] + 3
    for row in range(3):
        keep = [i for i in range(four.ids.shape[1]) if not (four.ids[row, i - 1] == four.ids[row, i] == IMAGE)]
        for values, more in zip(one[:3], four[:3], strict=True):
            assert (values[row] == more[row, keep]).all()


def loss_of(libra, batch: Batch, embed_images):
    """Sum of the losses of all labels, computed with the mask that the batch's segments say."""
    embeddings = libra.decoder.embed_tokens(batch.ids.clamp(0))
    images = [embed_images(pixels) for pixels in batch.pixels if pixels is not None]
    embeddings = embeddings.masked_scatter((batch.ids == IMAGE)[..., None], torch.cat(images))
    hidden = libra.decoder(
        embeddings, batch.positions, lambda layer, q, k, v: attention(q, k, v, segments=batch.segments)
    )
    logits = libra.decoder.head(hidden, libra.decoder.config.vocab_size)
    labels = batch.labels[:, 1:].flatten()
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels, ignore_index=IGNORED, reduction="sum")


@pytest.mark.parametrize("name", [name for name in TRAINING if name.endswith("align")])
def test_the_loss_of_a_batch_is_the_published_one(name):
    family = name.rsplit("-", 1)[0]
    libra, items = load(family), dataset(family)
    batch = collate([items[number] for number in ([0, 2] if family == "libra-3b" else [0, 1, 2])],
                    libra.image_positions)  # fmt: skip
    with torch.inference_mode():
        loss = loss_of(libra, batch, libra.embed_images) / (batch.labels != IGNORED).sum()
    assert relative(loss, golden(name)["loss"]) < 1e-5


# ------------------------------------------------------------------------------------------------ labels

TURNS = [("<image>\nIs there an effusion?", "No."), ("And now?", "A 2.5 cm one.\nIt has grown."), ("Sure?", "Yes.")]


def runs(ids, labels):
    grouped = itertools.groupby(zip(ids, labels, strict=True), key=lambda pair: pair[1] != IGNORED)
    return [[id for id, _ in pairs] for learnt, pairs in grouped if learnt]


@pytest.mark.parametrize("turns", [TURNS, [("Is there an effusion?", "No."), *TURNS[1:]]], ids=["image", "text"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_every_answer_of_every_template_is_learnt_with_its_end(template, turns):
    tokenizer, template = load("libra-3b").tokenizer, TEMPLATES[template]
    ids, labels, cut = encode(Record("1", [], turns), template, tokenizer, 2048)
    assert not cut and all(label in (IGNORED, id) for id, label in zip(ids, labels, strict=True))
    learnt = [tokenizer.backend.decode(run, skip_special_tokens=False) for run in runs(ids, labels)]
    answers = [answer + template.end for _, answer in turns]
    if template.drops_question:  # answers follow each other
        answers = ["".join(answers)]
    assert [text.strip() for text in learnt] == [text.strip() for text in answers]


@pytest.mark.parametrize("family", ["libra-7b", "libra-3b"])
@pytest.mark.parametrize("template", ["libra_v1", "libra_llama_3", "plain", "conv_gemma"])
def test_what_is_too_long_is_cut_behind_the_last_label_that_fits(family, template):
    tokenizer, turns = load(family).tokenizer, Record("1", [], TURNS)
    ids, labels, _ = encode(turns, TEMPLATES[template], tokenizer, 10**6)
    assert encode(turns, TEMPLATES[template], tokenizer, len(ids)) == (ids, labels, False)
    for limit in range(1, len(ids)):
        fitting = [length for length in range(1, limit + 1) if labels[length - 1] != IGNORED]
        length = fitting[-1] if fitting else 0
        assert encode(turns, TEMPLATES[template], tokenizer, limit) == (ids[:length], labels[:length], True)


def test_cut_and_skipped_records_are_counted(tmp_path):
    path = write(tmp_path, record(answer="No."), record(answer="It has grown. " * 9), record("Has it? " * 40))
    items = dataset("libra-7b", path, max_length=60)
    batch = collate([items[number] for number in range(3)], 1)
    assert (batch.cut, batch.skipped, len(batch.ids), len(batch.pixels)) == (1, 1, 2, 2)
    assert (batch.labels != IGNORED).any(1).all() and batch.ids.shape[1] == 60
    nothing = collate([items[2]], 1)
    assert (nothing.cut, nothing.skipped, nothing.ids.shape, nothing.pixels) == (0, 1, (0, 0), [])


def test_a_record_without_an_image_is_text_alone_and_an_image_that_is_cut_off_is_not_loaded(tmp_path):
    said = [{"from": who, "value": text} for who, text in (("human", "Hi?"), ("gpt", "Yes."))]
    late = [*said, {"from": "human", "value": "And <image> here?"}, {"from": "gpt", "value": "No."}]
    path = write(tmp_path, {"id": 1, "conversations": said}, record(conversations=late))
    items = dataset("libra-7b", path)
    assert items[0].pixels is None and IMAGE not in items[0].ids and len(runs(items[0].ids, items[0].labels)) == 1
    assert len(items[1].pixels) == 1 and items[1].ids.count(IMAGE) == 1
    short = dataset("libra-7b", path, max_length=items[1].ids.index(IMAGE))[1]
    assert short.pixels is None and short.cut and short.ids == items[0].ids
    both = collate([items[0], items[1]], 4)
    assert [pixels is None for pixels in both.pixels] == [True, False]


# ---------------------------------------------------------------------------------------- shared prefixes


def shared(tmp_path, family, most):
    """The same records as rows of their own and as rows that share a prefix."""
    pair, single = ["0.png", "1.png"], ["2.png"]
    texts = [("Has it grown?", "It has."), ("Is there a pneumothorax?", "No."), ("Effusion?", "A small one. " * 5)]
    path = write(tmp_path, *(record(*text, image, id=n) for n, (text, image) in
                             enumerate(itertools.product(texts, (pair, single)))))  # fmt: skip
    rows = shared_rows(check(Records(path), Record).keys, most)
    items = dataset(family, path)
    return [items[number] for number in range(6)], [items[row] for row in rows], [len(row) for row in rows]


@pytest.mark.parametrize("family", ["libra-7b", "libra-3b"])
@pytest.mark.parametrize("most", [2, 9])
def test_rows_that_share_a_prefix_have_the_loss_and_gradients_of_separate_rows(tmp_path, family, most):
    libra, (separate, joined, sizes) = load(family), shared(tmp_path, family, most)
    assert sizes == {2: [2, 1, 2, 1], 9: [3, 3]}[most]
    results = []
    for items in (separate, joined):
        batch = collate(items, libra.image_positions)
        images = {}

        def embed(pixels, images=images):
            key = pixels.numpy().tobytes()
            if key not in images:
                images[key] = libra.embed_images(pixels).requires_grad_()
            return images[key]

        loss = loss_of(libra, batch, embed)
        results.append([loss, *torch.autograd.grad(loss, images.values())])
    assert all(relative(one.detach(), other.detach()) < 1e-5 for one, other in zip(*results, strict=True))


def test_in_a_shared_row_each_record_sees_what_it_sees_alone(tmp_path):
    separate, joined, _ = shared(tmp_path, "libra-7b", 9)

    def sights(batch, row):
        """(id, label, position) of every learnt place, with all (id, position) that it sees."""
        segments, ids, labels, positions = (getattr(batch, name)[row].tolist() for name in
                                            ("segments", "ids", "labels", "positions"))  # fmt: skip
        for i in range(len(ids)):
            if labels[i] != IGNORED:
                seen = [j for j in range(i + 1) if segments[j] in (0, segments[i])]
                yield labels[i], positions[i], tuple((ids[j], positions[j]) for j in seen)

    alone, together = collate(separate, 4), collate(joined, 4)
    alone, together = (sorted(itertools.chain(*(sights(batch, row) for row in range(len(batch.ids)))))
                       for batch in (alone, together))  # fmt: skip
    assert alone == together


def test_only_records_with_the_same_images_in_their_first_turn_share(tmp_path):
    said = record()["conversations"]
    later = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hi"}, *said]
    records = [record(id=1), record(image=["1.png"], id=2), record(conversations=later, id=3), record(id=4),
               record(image=["0.png", "1.png"], id=5), record(image=["0.png", "0.png"], id=6)]  # fmt: skip
    keys = check(Records(write(tmp_path, *records)), Record).keys
    assert [row.tolist() for row in shared_rows(keys, 2)] == [[0, 3], [5], [1], [2], [4]]
    with pytest.raises(ValueError, match="no prefix to share"):
        dataclasses.replace(dataset("libra-7b"), template=TEMPLATES["plain"])[0, 1]


# ------------------------------------------------------------------------------------------------- order


def test_the_order_is_a_permutation_of_seed_and_epoch_alone():
    assert order(12, 3, 1).tolist() == [1, 3, 9, 5, 6, 0, 8, 10, 11, 7, 2, 4]  # in every version, so that a run resumes
    for count in (0, 1, 1000):
        first = order(count, 3, 1)
        assert sorted(first) == list(range(count)) and (first == order(count, 3, 1)).all()
    assert (order(1000, 3, 1) != order(1000, 3, 2)).any() and (order(1000, 3, 1) != order(1000, 4, 1)).any()


# ------------------------------------------------------------------------------------------ record files


def random_value(draw, depth=0):
    kind = draw.randrange(8 if depth < 3 else 5)
    if kind > 4:
        size = draw.randrange(4)
        if kind == 5:
            return [random_value(draw, depth + 1) for _ in range(size)]
        return {random_text(draw): random_value(draw, depth + 1) for _ in range(size)}
    return [None, True, draw.randrange(-(10**9), 10**9), draw.random() * 1e-7, random_text(draw)][kind]


def random_text(draw):
    return "".join(draw.choice('ab ,:[]{}"\\/\n\t\u0085é漢🫁\x00') for _ in range(draw.randrange(12)))


LAYOUTS = {
    "list": lambda records: json.dumps(records),
    "indented list": lambda records: "\ufeff \n" + json.dumps(records, indent=3, ensure_ascii=False),
    "list, Windows": lambda records: json.dumps(records, indent=1).replace("\n", "\r\n") + "\r\n\r\n",
    "lines": lambda records: "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records),
    "lines, Windows": lambda records: "\ufeff" + "\r\n\r\n".join(json.dumps(record) for record in records),
}


@pytest.mark.parametrize("block", [600, 601, 1 << 24])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_records_are_what_json_reads_wherever_blocks_end(tmp_path, monkeypatch, layout, block):
    draw = random.Random(layout)
    monkeypatch.setattr(data, "BLOCK", block)
    for _ in range(40):
        records = [{f"key {random_text(draw)}": random_value(draw)} for _ in range(draw.randrange(1, 30))]
        records = [record for record in records if len(json.dumps(record, indent=3)) < 500]
        path = tmp_path / "records"
        path.write_bytes(LAYOUTS[layout](records or [{}]).encode())
        read = Records(path)
        assert list(read) == [read[number] for number in range(len(read))] == (records or [{}])


def test_an_empty_list_has_no_records(tmp_path):
    path = tmp_path / "records.json"
    path.write_text(" [\n]\n")
    assert len(Records(path)) == 0 and check(Records(path), Record).duplicates == 0
    path.write_text("[1]")
    with pytest.raises(ValueError, match="record 1: is not a JSON object"):
        check(Records(path), Record)


def test_a_list_that_is_cut_anywhere_or_goes_on_is_refused(tmp_path, monkeypatch):
    text = json.dumps([{"a": 'b"]'}, {"c": [1, {"d": None}]}, {}])
    path = tmp_path / "records.json"
    for block in (30, 1 << 24):
        monkeypatch.setattr(data, "BLOCK", block)
        changed = text.replace("null", "nul"), text.replace(", ", " ", 1), text.replace(", ", "; ", 1)
        longer = text + ",", text + text, text[:-1] + ",]"
        for broken in (*changed, *longer, *(text[:end] for end in range(1, len(text)))):
            path.write_text(broken)
            with pytest.raises(ValueError, match=r"records\.json (record \d |goes on)") as caught:
                Records(path)
            assert "\n" not in str(caught.value)
    path.write_text("[" + " " * 99 + '{"a": "' + "long" * 20 + '"}]')
    monkeypatch.setattr(data, "BLOCK", 30)
    with pytest.raises(ValueError, match="record 1 is not JSON"):
        Records(path)
    for content in ("", " \n"):
        path.write_text(content)
        with pytest.raises(ValueError, match="empty"):
            Records(path)
    with pytest.raises(FileNotFoundError):
        Records(tmp_path / "none.json")


# ------------------------------------------------------------------------------------------------- checks

SAID = record()["conversations"]
BAD = {
    "id is missing": record(id=None),
    "neither a file name nor a list": record(image=["0.png"] * 3),
    "image [None]": record(image=[None]),
    "conversations is not": record(conversations=[{"from": "human"}]),
    "the speakers are none": record(conversations=[]),
    "the speakers are gpt, human": record(conversations=SAID[::-1]),
    "the speakers are human, not": record(conversations=SAID[:1]),
    "the speakers are human, human": record(conversations=SAID[:1] * 2),
    "an answer is empty": record(answer=" \n"),
    "an answer contains <image>": record(answer="<image>"),
    "<image> stands 1 times in the questions, not 0": record(image=[]),
    "<image> stands 2 times in the questions, not 1": record("<image>"),
    "<image> stands 0 times in the questions, not 1": record(
        conversations=[{"from": "human", "value": "?"}, SAID[1]]
    ),
    "no image none.png": record(image=["0.png", "none.png"]),
    "image /0.png leads out": record(image="/0.png"),
    "image a/../../0.png leads out": record(image="a/../../0.png"),
    "image link.png leads out": record(image="link.png"),
    "null byte": record(image="a\x00.png"),
}


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("0.png", "1.png"):
        Image.new("L", (3, 3)).save(folder / name)
    (folder / "link.png").symlink_to(GOLDEN / "images" / "0.png")
    (folder / "inside.png").symlink_to("0.png")
    return ImageFolder(folder, dataclasses.replace(load("libra-7b").pixels, pad="black"))


def test_all_problems_come_in_one_report_with_their_lines(tmp_path, folder):
    path = write(tmp_path, record(id=0), *BAD.values(), record(id=0, image="inside.png"), [], "text", None)
    with pytest.raises(ValueError) as caught:
        check(Records(path), Record, folder.find)
    report = str(caught.value)
    head = f"{path} has problems, {len(BAD) + 3} in all: "
    assert "\n" not in report and report.startswith(head)
    for line, words in enumerate(BAD, 2):
        (problem,) = [text for text in report.removeprefix(head).split("; ") if text.startswith(f"line {line}: ")]
        assert words in problem
    assert f"line {len(BAD) + 3}: is not a JSON object; " in report and report.endswith("; and 1 more")
    path = write(tmp_path, record(id=7), record(id=8, image="1.png"), record(id=7, image="inside.png"))
    checked = check(Records(path), Record, folder.find)
    assert (checked.duplicates, checked.images, checked.alone) == (1, 3, 0)


def test_a_broken_last_line_is_named(tmp_path):
    path = write(tmp_path, record())
    path.write_text(path.read_text() + '\n{"id": \n')
    with pytest.raises(ValueError, match=r"line 3: is not JSON"):
        check(Records(path), Record)
    with pytest.raises(ValueError, match=r"records\.jsonl line 3 is not JSON"):
        Records(path)[1]


@pytest.mark.parametrize("words", BAD)
def test_items_refuse_what_the_check_refuses(tmp_path, folder, words):
    items = dataclasses.replace(dataset("libra-7b", write(tmp_path, BAD[words])), images=folder)
    with pytest.raises(ValueError, match=r"^.*records\.jsonl line 1: ") as caught:
        items[0]
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_question_files_need_unique_ids_and_name_their_reference(tmp_path, folder):
    line = {"question_id": 1, "image": "0.png", "text": "Has it grown?"}
    lines = [line, line | {"question_id": "a", "impression": "I", "findings": "F"},
             line | {"question_id": "b", "findings": "F", "reference": "R", "image": ["0.png", "1.png"]}]  # fmt: skip
    records = Records(write(tmp_path, *lines))
    check(records, Question, folder.find)
    assert [Question.parse(raw).reference for raw in records] == [None, "F", "R"]
    assert Question.parse(records[2]) == Question("b", ["0.png", "1.png"], "Has it grown?", "R")
    bad = [line, line, line | {"text": "<image>?"}, line | {"image": []}, line | {"findings": 3}, {"text": "?"}]
    with pytest.raises(ValueError) as caught:
        check(Records(write(tmp_path, *bad)), Question, folder.find)
    for words in ("2: its id was there", "3: text is", "4: there is no", "5: findings is", "6: there is no"):
        assert f" line {words}" in str(caught.value)


def test_a_wrong_image_folder_is_refused(tmp_path):
    with pytest.raises(NotADirectoryError, match="no image folder"):
        ImageFolder(tmp_path / "none", load("libra-7b").pixels)


# ---------------------------------------------------------------------------------------------- loading


def test_worker_processes_give_the_same_batches():
    items, steps = dataset("libra-7b"), [[2, 0], [1]]
    loader = torch.utils.data.DataLoader(
        items, batch_sampler=steps, collate_fn=functools.partial(collate, image_positions=4), num_workers=1
    )
    for numbers, batch in zip(steps, loader, strict=True):
        expected = collate([items[number] for number in numbers], 4)
        assert all((one == other).all() for one, other in zip(batch[:4], expected[:4], strict=True))
        assert all((one == other).all() for one, other in zip(batch.pixels, expected.pixels, strict=True))


def test_records_open_anew_in_another_process():
    records = Records(RECORDS)
    assert list(pickle.loads(pickle.dumps(records))) == list(records)
