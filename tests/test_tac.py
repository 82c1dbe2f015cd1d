"""The oracles: golden values, and the equations of TAC as they are written, in torch's own modules."""

from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from conftest import cases, load, read, relative
from safetensors.torch import load_file
from torch import nn

from tac import TAC, BiasKVAttention, TACPart, make_connector


class PlainSqueezeExcite(nn.Module):
    def __init__(self, layers, squeezed):
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(layers, squeezed, 1), nn.Conv2d(squeezed, layers, 1)

    def forward(self, x):  # [B, L, N, C]
        return x * torch.sigmoid(self.fc2(F.gelu(self.fc1(x.mean((2, 3), keepdim=True)))))


def plain_extractor(L):
    half, quarter = max(1, L // 2), max(1, L // 4)
    return nn.Sequential(
        PlainSqueezeExcite(L, half), nn.Conv2d(L, half, 1, bias=False),
        PlainSqueezeExcite(half, quarter), nn.Conv2d(half, quarter, 1, bias=False),
        PlainSqueezeExcite(quarter, 1), nn.Conv2d(quarter, 1, 1, bias=False),
    )  # fmt: skip


def plain_attention(width, heads):
    return nn.MultiheadAttention(width, heads, add_bias_kv=True, batch_first=True)


def attend(module, query, source):
    return module(query, source, source)[0].contiguous()  # dropout draws in the order of memory


class PlainTAC(nn.Module):
    def __init__(self, L, width, heads, hidden):
        super().__init__()
        self.LFE, self.LFE_prior_bias = plain_extractor(L), nn.Parameter(torch.zeros(()))
        self.cur_self_attention = plain_attention(width, heads)
        self.prior_self_attention = plain_attention(width, heads)
        self.cros_attention = plain_attention(width, heads)
        self.dropout = nn.Dropout(0.1)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.norm3, self.norm4 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp_attn = nn.Sequential(
            nn.Linear(width, width), nn.GELU(), nn.Dropout(0.1), nn.Linear(width, width), nn.Dropout(0.1)
        )
        widths = [nn.Linear(width, hidden), *(nn.Linear(hidden, hidden) for _ in range(3))]
        self.mlp_final = nn.Sequential(*[module for linear in widths for module in (linear, nn.GELU())][:-1])

    def forward(self, features):  # [B, 2, L, N, C]
        c, p = (self.LFE(features[:, image])[:, 0] for image in (0, 1))  # [B, N, C]
        cosines = torch.stack([F.cosine_similarity(x.flatten(), y.flatten(), dim=0) for x, y in zip(c, p, strict=True)])
        p = p + ((cosines + 1) / 2)[:, None, None] ** 8 * self.LFE_prior_bias
        c1 = self.norm1(c + self.dropout(attend(self.cur_self_attention, c, c)))
        p1 = self.norm2(p + self.dropout(attend(self.prior_self_attention, p, p)))
        x = self.norm3(c1 + self.dropout(attend(self.cros_attention, c1, p1)))
        return self.mlp_final(self.norm4(c + self.mlp_attn(x)))


def randomised(ours, theirs):
    """Both in float64 with the same random parameters; the names must agree."""
    torch.manual_seed(0)
    for parameter in ours.parameters():
        nn.init.normal_(parameter, 0.1, 0.5)
    theirs.load_state_dict(ours.state_dict())
    return ours.double().eval(), theirs.double().eval()


def random_features(*shape):
    """Layers of different means, so that their gates differ; images that are alike, but not the same."""
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)
    return draw(shape[0], 1, *shape[2:]) + 0.7 * draw(*shape) + draw(*shape[:3], 1, 1)


def outputs_and_gradients(module, run, inputs):
    """Named outputs of a run, and the gradients of its inputs and of the module's parameters."""
    leaves = {f"input {i}": x.clone().requires_grad_() for i, x in enumerate(inputs)}
    out = run(*leaves.values())
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=out.dtype)
    leaves |= dict(module.named_parameters())
    gradients = torch.autograd.grad((out * weights).sum(), list(leaves.values()))
    return {"output": out.detach()} | dict(zip(leaves, gradients, strict=True))


def assert_same(ours, theirs, run_ours, run_theirs, *inputs):
    results = outputs_and_gradients(ours, run_ours, inputs)
    expected = outputs_and_gradients(theirs, run_theirs, inputs)
    assert results.keys() == expected.keys()
    for name, result in results.items():
        assert relative(result, expected[name]) < 1e-5, name


@pytest.mark.parametrize(("family", "case"), cases(), ids=lambda value: getattr(value, "name", value))
def test_golden_image_embeddings(family, case):
    expected = load_file(case / "expected.safetensors")
    embeddings = load(family).connector(expected["features"][None])[0]
    assert relative(embeddings, expected["image_embeddings"]) < 1e-4


@pytest.mark.parametrize("L", [12, 5, 2, 1])
def test_the_extractor_as_one_weighted_sum_equals_the_extractor_as_written(L):
    tac, plain = TAC(L, 12, 3, 8), plain_extractor(L)
    randomised(tac.LFE, plain)
    run_plain = lambda x: plain(x.flatten(0, 1)).unflatten(0, x.shape[:2])[:, :, 0]
    assert_same(tac.LFE, plain, tac.extract, run_plain, random_features(2, 2, L, 7, 12))


@pytest.mark.parametrize(("width", "heads"), [(24, 2), (36, 3), (20, 1)])
def test_attention_with_a_learned_key_equals_that_of_torch(width, heads):
    ours, theirs = randomised(BiasKVAttention(width, heads), plain_attention(width, heads))
    query, source = random_features(1, 2, 3, 9, width)[0]  # [3, 9, width] each
    assert_same(ours, theirs, ours, lambda q, s: attend(theirs, q, s), query[:, :7], source)


@pytest.mark.parametrize("sizes", [(12, 24, 2, 10), (5, 36, 3, 8), (2, 20, 1, 6)], ids=str)
def test_the_connector_equals_its_equations(sizes):
    ours, theirs = randomised(TAC(*sizes), PlainTAC(*sizes))
    assert_same(ours, theirs, ours, theirs, random_features(2, 2, sizes[0], 7, sizes[1]))


class PlainAblation(PlainTAC):
    """TAC without a part, by the equations for it."""

    def forward(self, features):  # [B, 2, L, N, C]
        if self.part == "extractor":
            c, p = features[:, 0, -1], features[:, 1, -1]
        else:
            c, p = self.LFE(features[:, 0])[:, 0], self.LFE(features[:, 1])[:, 0]
        if self.part != "prior_bias":
            cosine = F.cosine_similarity(c.flatten(1), p.flatten(1))
            p = p + ((cosine + 1) / 2)[:, None, None] ** 8 * self.LFE_prior_bias
        own, others = attend(self.cur_self_attention, c, c), attend(self.prior_self_attention, p, p)
        if self.part == "self_attention":
            own = others = 0
        c1, p1 = self.norm1(c + own), self.norm2(p + others)
        seen = p1 if self.part == "cross_attention" else attend(self.cros_attention, c1, p1)
        return self.mlp_final(self.norm4(c + self.mlp_attn(self.norm3(c1 + seen))))


@pytest.mark.parametrize("part", get_args(TACPart))
def test_tac_without_a_part_equals_its_equations_and_has_no_parameters_for_it(part):
    whole, theirs = randomised(TAC(5, 24, 2, 10), PlainAblation(5, 24, 2, 10))
    whole, theirs.part = dict(whole.named_parameters()), part
    ours = TAC(5, 24, 2, 10, without=(part,)).double().eval()
    ours.load_state_dict({name: whole[name] for name, _ in ours.named_parameters()})
    assert len(list(ours.parameters())) < len(whole)
    features = random_features(2, 2, 5, 7, 24)
    with torch.no_grad():
        assert relative(ours(features), theirs(features)) < 1e-6


def test_tac_without_all_of_these_parts_compares_the_images_place_by_place():
    tac = TAC(5, 24, 2, 10, without=get_args(TACPart)).eval()
    features = random_features(1, 2, 5, 7, 24).float()
    other = features.clone()
    other[0, 1, :, 3] += torch.randn(24)
    changed = (tac(features) != tac(other)).any(-1)[0]
    assert changed.tolist() == [place == 3 for place in range(7)]


def test_fresh_weights_are_those_of_torch_modules():
    torch.manual_seed(3)
    theirs = PlainTAC(5, 24, 2, 10).state_dict()
    torch.manual_seed(3)
    ours = TAC(5, 24, 2, 10).state_dict()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


@torch.no_grad()
@pytest.mark.parametrize("L", [12, 4])
def test_the_start_at_the_mean_of_the_layers_is_nearly_it_with_any_seed(L):
    features = random_features(2, 2, L, 7, 24).float()
    mean = features.mean(2)
    published, ours = [], []
    for seed in range(10):
        torch.manual_seed(seed)
        tac = TAC(L, 24, 2, 10)
        published.append(relative(tac.extract(features), mean))
        tac.start(None, layer_mean=0.5)
        ours.append(relative(tac.extract(features), 0.5 * mean))
    assert max(ours) < 0.75 < 0.9 < max(published)


@torch.no_grad()
@pytest.mark.parametrize("places", [49, 5])
def test_the_start_at_the_same_place_subtracts_the_prior_there(places):
    """By hand: where features tell their place, x = norm3(c1 - p1), whatever else the two images show."""
    torch.manual_seed(3)
    positions = torch.randn(places, 48)
    tac = TAC(5, 48, 2, 10).eval()
    tac.start(positions, same_place=20)
    current, prior = (F.layer_norm(positions + 0.2 * torch.randn(places, 48), (48,))[None] for _ in range(2))
    assert relative(tac.cros_attention(current, prior), -prior) < 1e-2


@torch.no_grad()
def test_the_shallow_start_lets_the_images_through():
    """What differs between inputs is more of the output than before, and it is what two layers alone would say."""
    x = torch.randn(500, 24, generator=torch.Generator().manual_seed(1))
    share = lambda out: float(out.std(0).norm() / out.mean(0).norm())
    for seed in range(5):
        torch.manual_seed(seed)
        tac = TAC(5, 24, 2, 10)
        published = share(tac.mlp_final(x))
        tac.start(None, shallow=True)
        out = tac.mlp_final(x)
        two_layers = tac.mlp_final[-1](F.gelu(tac.mlp_final[0](x)))
        both = torch.stack((out - out.mean(0), two_layers - two_layers.mean(0))).flatten(1)
        assert share(out) > 2 * published
        assert torch.corrcoef(both)[0, 1] > 0.95


def test_dropout_acts_in_training_only_and_where_the_equations_have_it():
    """The same seed drops the same elements, as both draw in the order current, prior, cross, mlp."""
    ours, theirs = randomised(TAC(5, 24, 2, 10), PlainTAC(5, 24, 2, 10))
    features = random_features(2, 2, 5, 7, 24)
    evaluated = ours(features).detach()
    outs = []
    for module in (ours.train(), theirs.train()):
        torch.manual_seed(4)
        outs.append(module(features).detach())
    assert relative(outs[0], outs[1]) < 1e-5 < 1e-2 < relative(outs[0], evaluated)
    assert torch.equal(ours.eval()(features), evaluated)


@torch.no_grad()
def test_a_study_does_not_depend_on_its_batch():
    tac, _ = randomised(TAC(5, 24, 2, 10), PlainTAC(5, 24, 2, 10))
    features = random_features(3, 2, 5, 7, 24)
    alone = torch.cat([tac(study[None]) for study in features])
    assert relative(tac(features), alone) < 1e-10


@torch.no_grad()
@pytest.mark.parametrize(("kind", "images"), [("mlp2x_gelu", 1), ("mlp2x_gelu_pair", 2)])
def test_an_mlp_takes_each_patch_alone_of_the_current_image_or_of_both(kind, images):
    features = random_features(2, 2, 1, 7, 24).float()
    connector = make_connector(kind, 1, 24, 2, 10)
    first, _, second = connector.projector
    for b, n in ((0, 3), (1, 6)):
        patch = torch.cat([features[b, image, 0, n] for image in range(images)])
        expected = second.weight @ F.gelu(first.weight @ patch + first.bias) + second.bias
        assert relative(connector(features)[b, n], expected) < 1e-5


@pytest.mark.parametrize(
    ("kind", "layers", "width", "culprit"),
    [("TAC", 12, 23, "width 23"), ("qformer", 1, 24, "qformer"), ("mlp2x_gelu", 12, 24, "mm_vision_select_layer")],
)
def test_a_connector_that_does_not_fit_is_refused(kind, layers, width, culprit):
    with pytest.raises(ValueError, match=culprit):
        make_connector(kind, layers, width, 2, 10)


def test_only_tac_has_parts_to_leave_out():
    with pytest.raises(ValueError, match="mlp2x_gelu' has no extractor"):
        make_connector("mlp2x_gelu", 1, 24, 2, 10, without=("extractor",))


def test_parameters_have_the_published_names():
    published = read("libra-7b", "model", "model.safetensors.index.json")["weight_map"]
    names = {name.removeprefix("model.mm_projector.") for name in published if ".mm_projector." in name}
    assert set(TAC(12, 48, 4, 64).state_dict()) == names
