"""K groups are K detectors that share all but their queries: outputs, losses and gradients; nothing remains."""

import copy

import numpy as np
import pytest
import torch
import transformers
from scipy.optimize import linear_sum_assignment
from transformers.loss.loss_deformable_detr import DeformableDetrForObjectDetectionLoss
from transformers.loss.loss_for_object_detection import ForObjectDetectionLoss
from transformers.loss.loss_lw_detr import LwDetrHungarianMatcher

from counterproof.detection import SetLoss, tiny_detector
from counterproof.detection.group_detr import GroupDetr, block_diagonal_mask, group_match, group_merge, group_split
from counterproof.detection.set_prediction import match_cost
from counterproof.errors import UserError

FAMILIES = ("deformable", "deformable, no refinement", "conditional", "dab", "detr")
each = pytest.mark.parametrize("family", FAMILIES)
K, N = 3, 5


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def detector(family, **config):
    """A tiny detector whose every weight matters: those that start at 0 are moved away from it."""
    family, _, without = family.partition(", ")
    if without:
        config["with_box_refine"] = False
    model = tiny_detector(family, width=32, num_queries=N, channels=(8, 16), **config)
    noise = generator(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=noise)
    return model


def grouped(family, num_groups=K, **config):
    return GroupDetr(num_groups).apply(detector(family, **config), generator())


def batch(sizes=(2, 0, 3), seed=0):
    noise = generator(seed)
    labels = [
        {
            "class_labels": torch.randint(3, (size,), generator=noise),
            "boxes": torch.rand(size, 4, generator=noise) * 0.4 + 0.2,
        }
        for size in sizes
    ]
    return {"pixel_values": torch.rand(len(sizes), 3, 32, 32, generator=noise), "labels": labels}


def place(model):
    name = "query_refpoint_embeddings" if model.config.model_type == "dab-detr" else "query_position_embeddings"
    return model.model, name


def queries_of(model):
    body, name = place(model)
    return getattr(body, name)


def all_rows(model):
    """The parameters of the queries: the first group's, and the others'."""
    named = dict(queries_of(model).named_parameters())
    assert set(named) == {"weight", "extra_groups"}
    return named["weight"], named["extra_groups"]


def plain_with(model, group):
    """The unmodified class with one group's queries."""
    first, extra = all_rows(model)
    rows = torch.cat([first, extra]).detach()[group * N : (group + 1) * N].clone()
    weights = {name: value for name, value in model.state_dict().items() if not name.endswith("extra_groups")}
    other = type(model)(model.config).train(model.training)
    other.load_state_dict(weights)
    with torch.no_grad():
        queries_of(other).weight.copy_(rows)
    return other


def shared_gradients(model):
    _, name = place(model)
    return {
        key: value.grad for key, value in model.named_parameters() if value.grad is not None and f"{name}." not in key
    }


# Equivalence


@each
def test_groups_are_detectors_that_differ_in_their_queries(family):
    model, data = grouped(family), batch()
    found = model(**data)
    found.loss.backward()
    losses, gradients = [], []
    for group in range(K):
        other = plain_with(model, group)
        alone = other(**data)
        alone.loss.backward()
        rows = slice(group * N, (group + 1) * N)
        torch.testing.assert_close(found.logits[:, rows], alone.logits, atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(found.pred_boxes[:, rows], alone.pred_boxes, atol=2e-6, rtol=1e-5)
        for ours, theirs in zip(found.auxiliary_outputs, alone.auxiliary_outputs, strict=True):
            torch.testing.assert_close(ours["logits"][:, rows], theirs["logits"], atol=2e-6, rtol=1e-5)
        losses.append(alone.loss.detach())
        gradients.append(shared_gradients(other))
    assert not torch.allclose(losses[0], losses[1])
    # Their losses are transformers' own, so this checks ours as well.
    torch.testing.assert_close(found.loss, sum(losses) / K)
    ours = shared_gradients(model)
    assert ours.keys() == gradients[0].keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, sum(one[name] for one in gradients) / K, atol=1e-5, rtol=1e-4)


@each
def test_no_group_depends_on_another(family):
    """Catches groups that are cut along the wrong dimension, and then all attend to each other."""
    model, data = grouped(family), batch()
    found = model(**data)
    for group in range(K):
        rows = slice(group * N, (group + 1) * N)
        part = torch.cat([found.logits[:, rows], found.pred_boxes[:, rows]], -1)
        weights = torch.randn(part.shape, generator=generator(group))
        gradient = torch.cat(torch.autograd.grad((part * weights).sum(), all_rows(model), retain_graph=True))
        own = torch.zeros(K * N, dtype=torch.bool)
        own[rows] = True
        assert (gradient[~own] == 0).all()
        assert (gradient[own].abs().sum(-1) > 0).all()
    first = found.logits[:, 0].sum()
    within = torch.autograd.grad(first, all_rows(model)[0])[0]
    assert (within[1:] != 0).any(), "queries of one group do attend to each other"


@each
def test_permuting_groups_and_queries_within_them_permutes_the_outputs(family):
    model, data = grouped(family), batch()
    before = model(**data)
    order = torch.cat([group * N + torch.randperm(N, generator=generator(group)) for group in (2, 0, 1)])
    first, extra = all_rows(model)
    rows = torch.cat([first, extra]).detach()[order]
    with torch.no_grad():
        first.copy_(rows[:N])
        extra.copy_(rows[N:])
    after = model(**data)
    torch.testing.assert_close(after.logits, before.logits[:, order], atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(after.pred_boxes, before.pred_boxes[:, order], atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(after.loss, before.loss)


@each
def test_self_attention_is_that_under_a_block_diagonal_mask(family):
    model = detector(family)
    plain = copy.deepcopy(model.model.decoder.layers[0].self_attn)
    attention = GroupDetr(K).apply(model, generator()).model.decoder.layers[0].self_attn
    hidden, position = (torch.randn(2, K * N, 32, generator=generator(seed)) for seed in (1, 2))
    name = "position_embeddings" if family.startswith(("deformable", "detr")) else "query_position_embeddings"
    mask = torch.zeros(K * N, K * N).masked_fill(~block_diagonal_mask(K, N), float("-inf"))
    expected = plain(hidden_states=hidden, attention_mask=mask[None, None], **{name: position})[0]
    found = attention(hidden_states=hidden, **{name: position})[0]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(plain(hidden_states=hidden, **{name: position})[0], expected, atol=1e-3)


def test_block_diagonal_mask_is_a_kronecker_product():
    assert np.array_equal(block_diagonal_mask(3, 2).numpy(), np.kron(np.eye(3), np.ones((2, 2))) > 0)


def test_split_and_merge():
    x = torch.arange(2 * 6 * 4).view(2, 6, 4)
    parts = group_split(x, 3)
    assert parts.shape == (6, 2, 4)
    for image in range(2):
        for group in range(3):
            assert torch.equal(parts[image * 3 + group], x[image, group * 2 : group * 2 + 2])
    assert torch.equal(group_merge(parts, 3), x)
    with pytest.raises(ValueError, match=r"6 rows.*num_groups=4"):
        group_split(x, 4)
    with pytest.raises(ValueError, match=r"6.*num_groups=4"):
        group_merge(parts, 4)


# Matching and loss


@pytest.mark.parametrize("sizes", [(3, 0, 5), (1, 9, 2)])
def test_matching_is_scipys_on_each_block_and_that_of_lw_detr(sizes):
    noise = generator(3)
    logits = torch.randn(3, K * N, 4, generator=noise)
    boxes = torch.rand(3, K * N, 4, generator=noise) * 0.4 + 0.2
    labels = batch(sizes)["labels"]
    cost = match_cost(logits, boxes, labels)
    found = group_match(cost, K, sizes)
    reference = LwDetrHungarianMatcher(class_cost=2, bbox_cost=5, giou_cost=2)
    theirs = reference({"logits": logits, "pred_boxes": boxes}, labels, K)
    for image, (rows, columns) in enumerate(found):
        pairs = set(zip(rows.tolist(), columns.tolist()))
        assert len(pairs) == len(rows) == K * min(N, sizes[image])
        expected = set()
        for group in range(K):
            block = cost[image, group * N : (group + 1) * N, : sizes[image]].numpy()
            expected |= {(row + group * N, column) for row, column in zip(*linear_sum_assignment(block))}
        assert pairs == expected == set(zip(*(side.tolist() for side in theirs[image])))
        taken = torch.bincount(columns, minlength=sizes[image])
        if sizes[image] <= N:
            assert (taken == K).all()  # every object has one query in each group
        else:
            assert (taken <= K).all()
        assert (rows[1:] > rows[:-1]).all()


def test_a_cost_that_is_not_finite_is_matched_last():
    cost = torch.rand(1, 4, 1, generator=generator())
    cost[0, :2] = torch.tensor([[float("nan")], [0.5]])
    assert group_match(cost, 2)[0][0][0] == 1
    with pytest.raises(ValueError, match="2 dimensions"):
        group_match(cost[0], 2)


@each
def test_pictures_without_objects_train_the_classes_only(family):
    model = grouped(family)
    found = model(**batch((0, 0)))
    assert found.loss_dict["loss_bbox"] == found.loss_dict["loss_giou"] == 0
    assert torch.isfinite(found.loss)
    found.loss.backward()
    heads = {"classes": ("class_embed", "class_labels_classifier"), "boxes": ("bbox_embed", "bbox_predictor")}
    reached = {
        what: any(
            value.grad is not None and bool(value.grad.any())
            for name, value in model.named_parameters()
            # not those within the decoder, which move the references of later layers
            if name.startswith(names)
        )
        for what, names in heads.items()
    }
    assert reached["classes"]
    if family in ("conditional", "detr", "deformable, no refinement"):
        assert not reached["boxes"]


def test_more_objects_than_queries_of_a_group():
    model = grouped("deformable")
    assert torch.isfinite(model(**batch((N + 3, 1))).loss)


@pytest.mark.parametrize("family", ["conditional", "detr"])
def test_a_loss_function_of_the_users_is_called_with_groups_in_the_batch(family):
    data = batch()
    expected = grouped(family)(**data)
    theirs = ForObjectDetectionLoss if family == "detr" else DeformableDetrForObjectDetectionLoss
    seen = []

    def own(logits, labels, *rest, **more):
        seen.append((len(logits), logits.shape[1], len(labels)))
        return theirs(logits, labels, *rest, **more)

    model = detector(family)
    model.loss_function = own
    GroupDetr(K).apply(model, generator())
    found = model(**data)
    # transformers' own loss of regrouped predictions is an independent reference of the fast one
    torch.testing.assert_close(found.loss, expected.loss)
    for name, value in expected.loss_dict.items():
        if name in found.loss_dict:
            torch.testing.assert_close(found.loss_dict[name], value)
    for ours, other in zip(found.auxiliary_outputs, expected.auxiliary_outputs, strict=True):
        torch.testing.assert_close(ours["pred_boxes"], other["pred_boxes"])
    model.eval()(**data)
    assert seen == [(3 * K, N, 3 * K), (3, N, 3)]
    with pytest.raises(ValueError, match="labels are for 2 images, the batch has 3"):
        model.train()(**(data | {"labels": data["labels"][:2]}))
    assert GroupDetr.strip(model).loss_function is own


def test_a_set_loss_gets_its_groups_and_back():
    model = detector("deformable")
    model.loss_function = SetLoss()
    GroupDetr(K).apply(model, generator())
    torch.testing.assert_close(model(**batch()).loss, grouped("deformable")(**batch()).loss)
    assert GroupDetr.strip(model).loss_function == SetLoss()


def test_a_loss_function_set_later_stays():
    model = grouped("deformable")
    later = SetLoss(K)
    model.loss_function = later
    assert GroupDetr.strip(model).loss_function is later


# One group, eval mode, and off again


@each
@pytest.mark.parametrize("mode", [True, False])
def test_one_group_is_the_plain_model_to_the_bit(family, mode):
    plain = detector(family).train(mode)
    model = GroupDetr(1).apply(copy.deepcopy(plain))
    data = batch()
    outputs = [one(**data) for one in (plain, model)]
    for output in outputs:
        output.loss.backward()
    assert torch.equal(outputs[0].logits, outputs[1].logits)
    assert torch.equal(outputs[0].pred_boxes, outputs[1].pred_boxes)
    assert torch.equal(outputs[0].loss, outputs[1].loss)
    for (name, one), (other_name, other) in zip(plain.named_parameters(), model.named_parameters(), strict=True):
        assert name == other_name
        assert (one.grad is None and other.grad is None) or torch.equal(one.grad, other.grad)


@each
def test_eval_mode_and_stripped_are_the_plain_model_to_the_bit(family):
    plain, data = detector(family), batch()
    keys, names = list(plain.state_dict()), [name for name, _ in plain.named_parameters()]
    model = GroupDetr(K).apply(copy.deepcopy(plain), generator())
    first = all_rows(model)[0]
    assert model(**data).logits.shape[1] == K * N
    assert model.config.num_queries == N
    expected = plain.eval()(**data)

    def same():
        found = model.eval()(**data)
        assert found.logits.shape[1] == N
        for what in ("logits", "pred_boxes", "loss"):
            assert torch.equal(getattr(found, what), getattr(expected, what))

    same()
    assert GroupDetr.strip(model) is model
    same()
    assert list(model.state_dict()) == keys
    assert [name for name, _ in model.named_parameters()] == names
    assert type(queries_of(model)) is torch.nn.Embedding
    assert queries_of(model).weight is first, "an optimizer goes on with the same parameter"
    assert "_loss_function" not in vars(model)
    for module in model.modules():
        ours = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        assert not any("counterproof" in (getattr(hook, "__module__", "") or "") for hook in ours)
    same_again = model.train()(**data)
    torch.testing.assert_close(same_again.loss, plain.train()(**data).loss, atol=0, rtol=0)
    assert GroupDetr.strip(model) is model


@each
def test_training_moves_every_group_and_the_stripped_model_is_what_eval_mode_was(family):
    model, data = grouped(family), batch()
    before = [rows.detach().clone() for rows in all_rows(model)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    for _ in range(2):
        optimizer.zero_grad()
        model(**data).loss.backward()
        optimizer.step()
    for rows, old in zip(all_rows(model), before):
        assert (rows != old).any(-1).all()
    model.eval()
    trained = model(**data)
    stripped = GroupDetr.strip(model)(**data)
    assert torch.equal(trained.logits, stripped.logits)
    assert torch.equal(trained.loss, stripped.loss)
    assert not queries_of(model).training
    assert GroupDetr(K).apply(model, generator())(**data).logits.shape[1] == N, "applied in eval mode, it stays in it"


@each
def test_saved_with_or_without_groups_it_loads_into_the_plain_class(family, tmp_path):
    model, data = grouped(family), batch()
    model.save_pretrained(tmp_path / "groups")  # in train mode
    expected = model.eval()(**data)
    GroupDetr.strip(model).save_pretrained(tmp_path / "plain")
    for folder in ("groups", "plain"):
        loaded, report = type(model).from_pretrained(tmp_path / folder, output_loading_info=True)
        assert torch.equal(loaded.eval()(**data).logits, expected.logits)
        assert not report["missing_keys"]
        unexpected = {f"model.{place(model)[1]}.extra_groups"} if folder == "groups" else set()
        assert set(report["unexpected_keys"]) == unexpected
    assert queries_of(loaded).weight.shape[0] == N


@each
def test_a_state_dict_with_groups_loads_into_a_model_with_groups(family):
    model, data = grouped(family), batch()
    other = GroupDetr(K, init="jitter").apply(detector(family), generator(5))
    assert not torch.equal(all_rows(model)[1], all_rows(other)[1])
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(**data).loss, other(**data).loss)


# Machinery around a model


@each
def test_a_deep_copy_is_a_model_of_its_own(family):
    model, data = grouped(family), batch()
    expected = model(**data).loss  # transformers puts hooks of its own at the first call
    other = copy.deepcopy(model)
    with torch.no_grad():
        for rows in all_rows(other):
            rows.zero_()
    assert torch.equal(model(**data).loss, expected)
    GroupDetr.strip(other)
    assert other(**data).logits.shape[1] == N
    assert model(**data).logits.shape[1] == K * N
    assert torch.equal(model(**data).loss, expected)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "dab"])  # transformers' DAB is float32
def test_bfloat16_and_double(family):
    for dtype in (torch.bfloat16, torch.float64):
        model, data = grouped(family).to(dtype), batch()
        found = model(pixel_values=data["pixel_values"].to(dtype), labels=data["labels"])
        found.loss.backward()
        assert found.logits.dtype == dtype
        assert torch.isfinite(all_rows(model)[1].grad).all()
    later = GroupDetr(K).apply(detector(family).bfloat16(), generator())
    assert {rows.dtype for rows in all_rows(later)} == {torch.bfloat16}


@each
def test_autocast(family):
    model, data = grouped(family), batch()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**data).loss
    loss.backward()
    torch.testing.assert_close(loss, model(**data).loss, rtol=0.05, atol=0)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "dab"])  # transformers' has none
def test_gradient_checkpointing_changes_nothing(family):
    data = batch()
    gradients = []
    for checkpointing in (False, True):
        model = grouped(family)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(**data).loss.backward()
        gradients.append(torch.cat([rows.grad for rows in all_rows(model)]))
    torch.testing.assert_close(*gradients)


@each
def test_a_decoder_that_is_in_eval_mode_alone_still_keeps_groups_apart(family):
    model, data = grouped(family), batch()
    expected = model(**data)
    model.model.decoder.eval()
    found = model(**data)
    assert found.logits.shape[1] == K * N
    torch.testing.assert_close(found.logits, expected.logits)


def test_frozen_queries_stay_frozen():
    model = detector("detr")
    queries_of(model).weight.requires_grad_(False)
    assert not any(rows.requires_grad for rows in all_rows(GroupDetr(K).apply(model, generator())))


# How the extra groups start


def test_resampled_groups_are_drawn_like_the_first_and_differ():
    model = tiny_detector("detr", num_queries=4000, width=32, channels=(8,))
    with torch.no_grad():
        queries_of(model).weight.mul_(torch.linspace(0.5, 2, 32)).add_(torch.arange(32.0))
    first, extra = (rows.detach() for rows in all_rows(GroupDetr(3).apply(model, generator())))
    for group in extra.split(4000):
        torch.testing.assert_close(group.mean(0), torch.arange(32.0), atol=0.15, rtol=0)
        torch.testing.assert_close(group.std(0), torch.linspace(0.5, 2, 32), atol=0, rtol=0.06)
        # normal: 68 and 95 % within one and two deviations
        apart = (group - first.mean(0)).abs() / first.std(0)
        assert (apart < 1).double().mean().item() == pytest.approx(0.6827, abs=0.01)
        assert (apart < 2).double().mean().item() == pytest.approx(0.9545, abs=0.01)
    one, two = ((group - group.mean(0)).flatten() for group in extra.split(4000))
    assert abs(torch.corrcoef(torch.stack([one, two]))[0, 1]) < 0.02


def test_jittered_groups_are_near_copies():
    model = GroupDetr(3, init="jitter").apply(detector("conditional"), generator())
    first, extra = (rows.detach() for rows in all_rows(model))
    for group in extra.split(N):
        apart = (group - first) / first.std(0, correction=0)
        assert 0.08 < apart.std().item() < 0.12
        assert (group != first).all()


def test_the_generator_alone_decides():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    one, two, three = (all_rows(GroupDetr(K).apply(detector("dab"), generator(seed)))[1] for seed in (0, 0, 1))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(one, two)
    assert not torch.equal(one, three)
    torch.manual_seed(0)
    default = all_rows(GroupDetr(K).apply(detector("dab")))[1]
    assert torch.equal(default, one)


# What is refused


def test_applying_twice():
    model = grouped("deformable")
    extra = all_rows(model)[1]
    hooks = len(model.model.decoder.layers[0].self_attn._forward_hooks)
    assert GroupDetr(K).apply(model) is model
    assert all_rows(model)[1] is extra
    assert len(model.model.decoder.layers[0].self_attn._forward_hooks) == hooks
    with pytest.raises(UserError, match=r"3 groups, not num_groups=2.*strip"):
        GroupDetr(2).apply(model)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"num_groups": 0}, "num_groups is 0"),
        ({"num_groups": 2.0}, "num_groups is 2.0"),
        ({"num_groups": True}, "num_groups is True"),
        ({"init": "copy"}, "init is 'copy'"),
    ],
)
def test_settings_out_of_range(settings, says):
    with pytest.raises(ValueError, match=says):
        GroupDetr(**settings)


def test_models_it_does_not_fit():
    def untouched(model, says):
        before = {name: type(module) for name, module in model.named_modules()}
        for call in (GroupDetr(K).apply, GroupDetr.strip):
            with pytest.raises(UserError, match=says):
                call(model)
        assert {name: type(module) for name, module in model.named_modules()} == before

    untouched(tiny_detector("deformable", num_queries=N, width=32, channels=(8,), two_stage=True), "two-stage")
    untouched(tiny_detector("dab", num_queries=N, width=32, channels=(8,), num_patterns=2), "num_patterns=0")
    untouched(torch.nn.Linear(2, 2), "DeformableDetrForObjectDetection.*got Linear")
    untouched(torch.nn.Sequential(detector("detr")), "not wrapped; got Sequential")
    untouched(detector("detr").model, "got DetrModel")
    for name, says in [
        ("RTDetr", "chooses its queries"),
        ("RTDetrV2", "chooses its queries"),
        ("DFine", "chooses its queries"),
        ("LwDetr", "groups built in.*group_detr"),
        ("RfDetr", "groups built in.*group_detr"),
        ("Yolos", "got YolosForObjectDetection"),
    ]:
        kind = getattr(transformers, f"{name}ForObjectDetection")
        empty = kind.__new__(kind)  # the class is what counts; its weights would take seconds to draw
        torch.nn.Module.__init__(empty)
        untouched(empty, says)


def test_queries_that_are_all_alike():
    model = detector("detr")
    with torch.no_grad():
        queries_of(model).weight.fill_(0.3)
    with pytest.raises(UserError, match="all alike"):
        GroupDetr(K).apply(model, generator())
    assert type(queries_of(model)) is torch.nn.Embedding


@each
def test_labels_for_another_number_of_images(family):
    data = batch()
    with pytest.raises(ValueError, match="labels are for 2 images, the batch has 3"):
        grouped(family)(**(data | {"labels": data["labels"][:2]}))


def test_a_mask_over_queries_is_refused_in_training():
    model, data = grouped("detr"), batch()
    mask = torch.ones(3, K * N)
    mask[0, 2] = 0
    with pytest.raises(ValueError, match="decoder_attention_mask"):
        model(**data, decoder_attention_mask=mask)
    model.eval()(**data, decoder_attention_mask=mask[:, :N])
