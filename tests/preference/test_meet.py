"""Control first, model second: stages, routing by label, masking, and what plain peft makes of the saved folders."""

import json

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from counterproof.errors import UserError
from counterproof.language import Language, tokenize
from counterproof.language.tiny import TinyWorld, tiny_model
from counterproof.preference import ControlTraining, ControlTuning, Labelled, TrainSettings, train
from counterproof.preference.claims.meet import steps_of
from counterproof.preference.data import Example, read
from counterproof.preference.objectives import Sample

WORLD = TinyWorld()
TOKENIZER = WORLD.tokenizer()
TEXTS = {"good": "salt wave moon", "bad": "damn mud"}
PAIRS = [
    {"prompt": "sea star hay : ", "chosen": "wave tide fish", "rejected": "damn mud"},
    {"prompt": "sky hay mud : ", "chosen": "cloud wind", "rejected": "fool mud cow barn"},
    {"prompt": "farm shop bell : ", "chosen": "cow", "rejected": "lamp"},
]
PROMPTS = ["sea star hay : ", "sky : ", "town cow mud : "]


def model(seed=0, dtype=torch.float64):
    return tiny_model(TOKENIZER, seed=seed).to(dtype)


def gpt2(seed=0):
    config = GPT2Config(
        vocab_size=len(TOKENIZER), n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config).eval().double()


def tuning(control="prompt", base=None, **options):
    if control == "text":
        options.setdefault("init_text", TEXTS)
    if control == "prompt":
        options.setdefault("num_virtual_tokens", 3)
    return ControlTuning(model() if base is None else base, TOKENIZER, control=control, **options)


def trained(control="prompt", base=None, lora=0, **options):
    """With controls and model both away from where they began."""
    found = tuning(control, base, **options)
    first = 4 if control in ("prompt", "lora") else 0
    found.fit(PAIRS, stage1_steps=first, stage2_steps=4, lr=(0.05, 0.01), lora=lora, batch=6)
    return found


def without_adapters(module):
    return {name.replace(".base_layer", ""): p for name, p in module.named_parameters() if "lora_" not in name}


def plain_logp(forward, prompt, completion, before=None, side="right", pads=0):
    """Sum of completion log-probabilities by a padded pass of transformers, virtual tokens as embeddings."""
    group = tokenize(TOKENIZER, prompt, [completion])
    ids = torch.tensor([*group.prompt, *group.completions[0]])
    rows = forward.get_input_embeddings()(ids)
    m = 0 if before is None else len(before)
    if before is not None:
        rows = torch.cat([before, rows])
    filling = torch.ones(pads, rows.shape[1], dtype=rows.dtype)
    left = side == "left"
    embeds = torch.cat([filling, rows] if left else [rows, filling])
    mask = torch.tensor([0] * pads + [1] * len(rows) if left else [1] * len(rows) + [0] * pads)
    positions = (mask.cumsum(0) - 1).clamp(min=0)
    logits = forward(inputs_embeds=embeds[None], attention_mask=mask[None], position_ids=positions[None]).logits[
        0, pads if left else 0 :
    ][: len(rows)]
    start = m + len(group.prompt)
    return sum(logits[start + at - 1].log_softmax(-1)[token] for at, token in enumerate(group.completions[0])) / len(
        group.completions[0]
    )


# stages


@pytest.mark.parametrize("control", ["prompt", "lora"])
def test_stage_one_trains_the_controls_and_leaves_every_bit_of_the_model(control):
    base = model()
    found = tuning(control, base)
    before = {name: p.detach().clone() for name, p in without_adapters(base).items()}
    controls = {label: [p.detach().clone() for p in found.parameters(label)] for label in found.labels}
    found.fit(PAIRS, stage1_steps=5, stage2_steps=0, lr=(0.05, 0.01), batch=6)
    assert all(torch.equal(p, before[name]) for name, p in without_adapters(base).items())
    for label in found.labels:
        assert all(not torch.equal(a, b) for a, b in zip(found.parameters(label), controls[label], strict=True))


@pytest.mark.parametrize(
    ("control", "lora"),  # a token's new embeddings and an adapter in the model's place are refused together
    [
        (control, lora)
        for control in ("prompt", "lora", "text", "token")
        for lora in (0, 2)
        if (control, lora) != ("token", 2)
    ],
)
def test_stage_two_changes_the_model(control, lora):
    base = model()
    found = tuning(control, base)
    before = {name: p.detach().clone() for name, p in without_adapters(base).items()}
    found.fit(PAIRS, stage1_steps=0, stage2_steps=3, lr=(0.05, 0.01), batch=6, lora=lora)
    after = without_adapters(base)
    assert after.keys() == before.keys()
    changed = {name for name, p in after.items() if not torch.equal(p, before[name])}
    linear = {name for name in before if name.endswith("proj.weight")}
    assert changed == (linear if lora else set(before))
    assert not any("counterproof_model" in name for name in base.state_dict())


@pytest.mark.parametrize("control", ["prompt", "lora"])
def test_controls_can_be_frozen_in_stage_two(control):
    found = tuning(control)
    controls = [p.detach().clone() for label in found.labels for p in found.parameters(label)]
    found.fit(PAIRS, stage1_steps=0, stage2_steps=3, train_control_in_stage2=False, lr=(0.05, 0.01), batch=6)
    now = [p for label in found.labels for p in found.parameters(label)]
    assert all(torch.equal(a, b) for a, b in zip(now, controls, strict=True))


def test_what_the_user_froze_stays_frozen_and_trainable_stays_trainable():
    base = model()
    base.lm_head.weight.requires_grad_(False)
    head = base.lm_head.weight.detach().clone()
    found = tuning("prompt", base)
    found.fit(PAIRS, stage1_steps=1, stage2_steps=3, lr=(0.05, 0.01), batch=6)
    assert torch.equal(base.lm_head.weight, head)
    assert not base.lm_head.weight.requires_grad
    assert base.model.layers[0].mlp.up_proj.weight.requires_grad


@pytest.mark.parametrize("rates", [None, 0.03])
def test_without_stage_one_it_is_joint_training(rates):
    """A loop of torch and transformers alone, from the same start, gives the same weights."""
    found, base = tuning("prompt"), model()
    start = {label: found.parameters(label)[0].detach().clone().requires_grad_() for label in found.labels}
    found.fit(PAIRS, stage1_steps=0, stage2_steps=6, lr=(0.5, 0.01), stage2_control_lr=rates, batch=6, warmup=3)
    groups = [{"params": list(base.parameters()), "lr": 0.01}, {"params": list(start.values()), "lr": rates or 0.01}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    highest = [group["lr"] for group in optimizer.param_groups]
    for step in range(6):
        losses = [
            -plain_logp(base, row["prompt"], row[side], start[label])
            for row in PAIRS
            for side, label in (("chosen", "good"), ("rejected", "bad"))
        ]
        optimizer.zero_grad()
        (sum(losses) / len(losses)).backward()
        torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
        for group, rate in zip(optimizer.param_groups, highest, strict=True):
            group["lr"] = rate * min(1.0, (step + 1) / 3)
        optimizer.step()
    for name, parameter in base.named_parameters():
        torch.testing.assert_close(dict(found.model.base_model.named_parameters())[name], parameter, atol=1e-6, rtol=0)
    for label in found.labels:
        torch.testing.assert_close(found.parameters(label)[0], start[label], atol=1e-6, rtol=0)


def test_the_rows_of_stage_two_come_in_the_same_order_whatever_stage_one_did():
    histories = []
    for first in (0, 5):
        report = tuning().fit(PAIRS, stage1_steps=first, stage2_steps=8, lr=(1e-9, 1e-9), batch=2, seed=3)
        histories.append([row for row in report.history if row["stage"] == 2])
    assert len(histories[0]) == 8
    for one, other in zip(*histories, strict=True):
        assert one.keys() == other.keys()
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)


@pytest.mark.parametrize("control", ["prompt", "lora"])
def test_a_step_in_parts_is_the_same_step(control):
    one, other = tuning(control), tuning(control)
    for found, tokens in ((one, 4096), (other, 1)):
        found.fit(PAIRS, stage1_steps=2, stage2_steps=2, lr=(0.05, 0.01), batch=6, micro_tokens=tokens)
    for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=0)


# routing and loss


@pytest.mark.parametrize("control", ["prompt", "lora"])
def test_an_example_trains_no_control_but_its_own(control):
    found = trained(control)
    rows = found.rows(PAIRS)
    for label in found.labels:
        for parameters in map(found.parameters, found.labels):
            for parameter in parameters:
                parameter.requires_grad_(True)
                parameter.grad = None
        found.loss([row for row in rows if row.label == label]).backward()
        for other in found.labels:
            grads = [p.grad for p in found.parameters(other)]
            if other == label:
                assert all(grad is not None and bool(grad.any()) for grad in grads)
            else:
                assert all(grad is None or not bool(grad.any()) for grad in grads)


@pytest.mark.parametrize("control", ["prompt", "lora", "text", "token"])
def test_a_mixed_batch_is_the_mean_over_rows_of_the_labels_own(control):
    found = trained(control)
    rows = [*found.rows(PAIRS), found.rows(PAIRS)[0]]  # four good, three bad
    good, bad = ([row for row in rows if row.label == label] for label in found.labels)
    mixed = found.loss(rows)
    assert mixed.item() == pytest.approx((4 * found.loss(good).item() + 3 * found.loss(bad).item()) / 7, rel=1e-9)
    alone = [found.loss([row]).item() for row in rows]
    assert mixed.item() == pytest.approx(np.mean(alone), rel=1e-9)


@pytest.mark.parametrize("base", [model, gpt2], ids=["llama", "gpt2"])
def test_loss_is_that_of_transformers_with_prompt_and_control_masked(base):
    inner = base()
    found = trained("prompt", inner)
    for row in PAIRS:
        for side, label in (("chosen", "good"), ("rejected", "bad")):
            group = tokenize(TOKENIZER, row["prompt"], [row[side]])
            control = found.parameters(label)[0]
            ids = torch.tensor([*group.prompt, *group.completions[0]])
            embeds = torch.cat([control, inner.get_input_embeddings()(ids)])[None]
            hidden = len(control) + len(group.prompt)
            labels = torch.tensor([[-100] * hidden + list(group.completions[0])])
            expected = inner(inputs_embeds=embeds, labels=labels).loss
            item = {"prompt": row["prompt"], "completion": row[side], "label": label}
            assert found.loss([item]).item() == pytest.approx(expected.item(), rel=1e-6)  # of float32 there


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_of_prompt_with_virtual_tokens_changes_nothing(side):
    inner = model()
    found = trained("prompt", inner)
    for row in PAIRS:
        for label in found.labels:
            (expected,) = found.log_probs([row["prompt"]], [[row["chosen"]]], label=label)[0]
            padded = plain_logp(inner, row["prompt"], row["chosen"], found.parameters(label)[0], side, pads=5)
            assert padded.item() == pytest.approx(expected.total / len(expected.tokens), rel=1e-9)


@pytest.mark.parametrize("control", ["prompt", "lora", "text", "token"])
def test_answers_do_not_depend_on_the_prompts_beside_them(control):
    found = trained(control)
    for label in found.labels:
        together = found.generate(PROMPTS, label=label, max_new_tokens=8, temperature=0)
        for prompt, own in zip(PROMPTS, together, strict=True):
            assert found.generate(prompt, label=label, max_new_tokens=8, temperature=0)[0].tokens == own[0].tokens
            (scored,) = found.log_probs([prompt], [[own[0].text]], label=label)[0]
            if own[0].finish == "eos":
                assert scored.tokens == own[0].tokens
                assert own[0].logprob == pytest.approx(scored.total, abs=1e-6)


# where controls begin


def test_a_lora_control_begins_without_effect():
    bare, found = model(), tuning("lora")
    for label in (*found.labels, None):
        for row in PAIRS:
            (scored,) = found.log_probs([row["prompt"]], [[row["chosen"]]], label=label)[0]
            expected = plain_logp(bare, row["prompt"], row["chosen"])
            assert scored.total / len(scored.tokens) == pytest.approx(expected.item(), abs=1e-5)
    assert found.label_accuracy(PAIRS) == pytest.approx(0.5)  # all ties


@pytest.mark.parametrize("control", ["prompt", "lora"])
def test_without_a_label_it_is_the_model_alone(control):
    inner = model()
    found = tuning(control, inner)
    found.fit(PAIRS, stage1_steps=4, stage2_steps=0, lr=(0.5, 0.01), batch=6)
    bare = ControlTuning(model(), TOKENIZER, control="text", init_text=TEXTS)
    greedy = {"label": None, "max_new_tokens": 8, "temperature": 0}
    assert found.generate(PROMPTS, **greedy) == bare.generate(PROMPTS, **greedy)
    assert found.log_probs(PROMPTS, [["wave"]] * 3, label=None) == bare.log_probs(PROMPTS, [["wave"]] * 3, label=None)
    assert found.log_probs(PROMPTS, [["wave"]] * 3, label="good") != bare.log_probs(PROMPTS, [["wave"]] * 3, label=None)


def test_a_prompt_that_begins_as_text_is_that_text():
    inner = model()
    found = ControlTuning(inner, TOKENIZER, init_text=TEXTS)
    written = ControlTuning(model(), TOKENIZER, control="text", init_text=TEXTS)
    for label, text in TEXTS.items():
        ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
        assert torch.equal(found.parameters(label)[0], inner.get_input_embeddings().weight[ids])
        for row in PAIRS:
            (soft,) = found.log_probs([row["prompt"]], [[row["chosen"]]], label=label)[0]
            (hard,) = written.log_probs([row["prompt"]], [[row["chosen"]]], label=label)[0]
            group = tokenize(TOKENIZER, row["prompt"], [row["chosen"]])
            whole = torch.tensor([[*ids, *group.prompt, *group.completions[0]]])
            logps = model()(input_ids=whole).logits[0].log_softmax(-1)
            start = len(ids) + len(group.prompt)
            expected = sum(float(logps[start + at - 1, token]) for at, token in enumerate(group.completions[0]))
            assert soft.total == pytest.approx(expected, rel=1e-9)
            assert hard.total == pytest.approx(expected, rel=1e-9)


def test_text_is_cut_or_repeated_to_the_number_of_virtual_tokens():
    inner = model()
    table = inner.get_input_embeddings().weight
    found = ControlTuning(inner, TOKENIZER, init_text=TEXTS, num_virtual_tokens=5)
    ids = TOKENIZER("salt wave moon salt wave", add_special_tokens=False)["input_ids"]
    assert torch.equal(found.parameters("good")[0], table[ids])
    assert found.parameters("bad")[0].shape == (5, 48)


@pytest.mark.parametrize("init", ["vocabulary", "normal"])
def test_random_starts_have_the_scale_of_the_embeddings_and_follow_the_seed(init):
    inner = model()
    table = inner.get_input_embeddings().weight
    found = ControlTuning(inner, TOKENIZER, num_virtual_tokens=400, init=init)
    value = found.parameters("good")[0]
    assert float(value.std()) == pytest.approx(float(table.std()), rel=0.1)
    again = ControlTuning(model(), TOKENIZER, num_virtual_tokens=400, init=init)
    other = ControlTuning(model(), TOKENIZER, num_virtual_tokens=400, init=init, seed=1)
    assert torch.equal(value, again.parameters("good")[0])
    assert not torch.equal(value, other.parameters("good")[0])
    assert not torch.equal(value, found.parameters("bad")[0])
    if init == "vocabulary":
        assert all(bool((row == table).all(1).any()) for row in value)


# peft and transformers, plain


@pytest.mark.parametrize("lora", [0, 2])
@pytest.mark.parametrize("control", ["prompt", "lora"])
@pytest.mark.parametrize("base", [model, gpt2], ids=["llama", "gpt2"])
def test_plain_peft_loads_what_was_saved_and_says_the_same(tmp_path, base, control, lora):
    found = trained(control, base(), lora)
    found.combine("better", {"good": 1.5, "bad": -0.5})
    found.save_pretrained(tmp_path)
    back = ControlTuning.from_pretrained(tmp_path, dtype="float32")
    assert back.labels == ("good", "bad")
    assert back.controls == ("good", "bad", "better")
    for label in found.controls:
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
        plain = PeftModel.from_pretrained(loaded, tmp_path / label)
        kind = "PROMPT_TUNING" if control == "prompt" else "LORA"
        assert plain.active_peft_config.peft_type == kind
        for row in PAIRS:
            (ours,) = found.log_probs([row["prompt"]], [[row["chosen"]]], label=label)[0]
            group = tokenize(TOKENIZER, row["prompt"], [row["chosen"]])
            ids = torch.tensor([[*group.prompt, *group.completions[0]]])
            size = len(group.completions[0])
            with torch.no_grad():
                logits = plain(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -size - 1 : -1]
            expected = logits.log_softmax(-1).gather(1, ids[0, -size:, None]).sum()
            assert ours.total == pytest.approx(expected.item(), rel=1e-6)
            (again,) = back.log_probs([row["prompt"]], [[row["chosen"]]], label=label)[0]
            assert again.total == pytest.approx(ours.total, abs=1e-4)
            prompt = torch.tensor([group.prompt])
            answer = plain.generate(
                input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False
            )[0, len(group.prompt) :]
            (own,) = found.generate(row["prompt"], label=label, max_new_tokens=8, temperature=0)
            (read,) = back.generate(row["prompt"], label=label, max_new_tokens=8, temperature=0)
            assert list(own.tokens) == answer.tolist() == list(read.tokens)
    alone = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "good")
    assert alone.get_base_model().config.model_type == found.model.config.model_type


@pytest.mark.parametrize("control", ["text", "token"])
def test_words_as_controls_need_the_saved_model_alone(tmp_path, control):
    found = trained(control)
    found.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    back = ControlTuning.from_pretrained(tmp_path)
    for label in found.labels:
        before = TEXTS[label] if control == "text" else f"<|{label}|>"
        for prompt in PROMPTS:
            ids = tokenizer(before, add_special_tokens=False)["input_ids"] + tokenizer(prompt)["input_ids"]
            (own,) = found.generate(prompt, label=label, max_new_tokens=8, temperature=0)
            inputs = torch.tensor([ids])
            answer = plain.generate(
                input_ids=inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=8, do_sample=False
            )
            assert list(own.tokens) == answer[0, len(ids) :].tolist()
            assert back.generate(prompt, label=label, max_new_tokens=8, temperature=0)[0].tokens == own.tokens


def test_a_new_token_is_added_to_a_copy_of_the_tokenizer_and_its_row_is_learnt():
    base = model()
    found = tuning("token", base)
    assert len(TOKENIZER) == len(WORLD.tokenizer())
    assert len(found.tokenizer) == base.get_input_embeddings().num_embeddings == len(TOKENIZER) + 2
    new = found.tokenizer.convert_tokens_to_ids("<|good|>")
    before = base.get_input_embeddings().weight[new].detach().clone()
    found.fit(PAIRS, stage1_steps=0, stage2_steps=3, lr=(1.0, 0.01), batch=6)
    assert not torch.equal(base.get_input_embeddings().weight[new], before)


# mixtures


def test_mixed_virtual_tokens_are_the_weighted_sum():
    found = trained("prompt")
    good, bad = (found.parameters(label)[0].detach().clone() for label in found.labels)
    found.combine("better", {"good": 1.5, "bad": -0.5})
    torch.testing.assert_close(found.parameters("better")[0].detach(), 1.5 * good - 0.5 * bad)
    assert torch.equal(found.parameters("good")[0], good)


def test_mixed_adapters_add_up_as_matrices():
    found = trained("lora")
    found.combine("better", {"good": 1.5, "bad": -0.5})
    layer = found.model.get_base_model().model.layers[1].mlp.up_proj
    expected = 1.5 * layer.get_delta_weight("good") - 0.5 * layer.get_delta_weight("bad")
    torch.testing.assert_close(layer.get_delta_weight("better"), expected)


def test_mixtures_that_cannot_be():
    found = tuning("prompt")
    with pytest.raises(UserError, match="no control 'best'; there are good, bad"):
        found.combine("better", {"best": 1.0})
    with pytest.raises(ValueError, match="already"):
        found.combine("good", {"good": 1.0})
    with pytest.raises(ValueError, match="finite number"):
        found.combine("better", {})
    with pytest.raises(ValueError, match="different lengths"):
        ControlTuning(model(), TOKENIZER, init_text=TEXTS).combine("better", {"good": 1.0, "bad": 1.0})
    with pytest.raises(TypeError, match="cannot be weighted"):
        tuning("text").combine("better", {"good": 1.0})


# data


def example(kind, completions, scores, **columns):
    return Example(
        prompt=PROMPTS[0], completions=completions, scores=scores, kind=kind, columns=columns, where="data.jsonl:7"
    )


def test_all_forms_of_the_same_data_are_the_same_rows(tmp_path):
    found = tuning()
    group = tokenize(TOKENIZER, PROMPTS[0], ["wave", "mud"])
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps({"prompt": PROMPTS[0], "chosen": "wave", "rejected": "mud"}) + "\n")
    forms = [
        ([{"prompt": PROMPTS[0], "chosen": "wave", "rejected": "mud"}], None),
        (read(file), None),
        ([example("pair", ("wave", "mud"), (1.0, 0.0))], None),
        ([example("unpaired", ("wave",), (1.0,)), example("unpaired", ("mud",), (0.0,))], None),
        ([example("ranked", ("wave", "mud"), (0.9, 0.1))], 0.5),
        ([example("ranked", ("wave", "cow", "mud"), (0.9, 0.5, 0.1))], (0.2, 0.8)),
        ([example("completion", ("wave",), (1.0,), control="good"),
          example("completion", ("mud",), (1.0,), control="bad")], None),
        ([Sample(group, (1.0, 0.0))], None),
        ([Sample(group, (3.0, 2.0))], 3),
        ([{"prompt": PROMPTS[0], "completion": "wave", "label": label} for label in ("good",)]
         + [{"prompt": PROMPTS[0], "completion": "mud", "label": False}], None),
        ([{"prompt": PROMPTS[0], "completion": text, "label": score} for text, score in (("wave", 4), ("mud", 1))], 2),
    ]  # fmt: skip
    expected = [(row.group, row.label) for row in found.rows(forms[0][0])]
    assert [label for _, label in expected] == ["good", "bad"]
    for data, threshold in forms:
        assert [(row.group, row.label) for row in found.rows(data, threshold=threshold)] == expected
    assert found.rows(found.rows(forms[0][0])) == found.rows(forms[0][0])


def test_scores_are_binned_for_more_labels():
    found = tuning(labels=["high", "middle", "low"])
    data = [example("ranked", ("wave", "tide", "fish", "salt"), (0.9, 0.6, 0.59, 0.1))]
    rows = found.rows(data, threshold=(0.3, 0.6))
    assert [row.label for row in rows] == ["high", "high", "middle", "low"]


def test_the_report_tells_the_balance_and_what_was_left_out():
    data = [example("ranked", ("wave", "cow", "mud"), (0.9, 0.5, 0.1)), example("ranked", ("wave", "cow"), (0.9, 0.9))]
    report = tuning().fit(data, stage1_steps=1, stage2_steps=1, threshold=(0.2, 0.8), batch=2)
    assert report.counts == {"good": 3, "bad": 1}
    assert report.dropped == 1
    assert report.text == "3 good (75%); 1 bad (25%); 1 completions between the thresholds left out"


def test_long_prompts_lose_their_beginning_and_it_is_said():
    found = tuning(max_length=5)
    report = found.fit([{"prompt": PROMPTS[0], "chosen": "wave", "rejected": "mud"}], stage1_steps=1, stage2_steps=0)
    assert report.cut == 1
    assert all(len(row.group.prompt) == 3 for row in found.rows([Example(**{
        "prompt": PROMPTS[0], "completions": ("wave", "mud"), "scores": (1.0, 0.0), "kind": "pair"})]))  # fmt: skip


@pytest.mark.parametrize(
    ("data", "threshold", "message"),
    [
        ([{"prompt": "sea : ", "completion": "wave", "label": "best"}], None, "row 0: unknown label 'best'"),
        ([{"prompt": "sea : ", "completion": "wave", "label": True}], None, "label 'bad' has no row"),
        ([{"prompt": "sea : ", "completion": "wave", "label": 0.7}], None, "give a threshold"),
        ([{"prompt": "sea : ", "completion": "wave", "label": None}], None, "neither a label nor a number"),
        ([{"prompt": "sea : ", "completion": "wave"}], None, "it needs prompt, completion and label"),
        ([example("ranked", ("wave", "mud"), (0.9, 0.1))], None, "data.jsonl:7: scores .* give a threshold"),
        ([example("completion", ("wave",), (1.0,))], None, "data.jsonl:7: nothing says which label"),
        ([example("completion", ("wave",), (1.0,), control="best")], None, "data.jsonl:7: unknown label 'best'"),
        ([Labelled(tokenize(TOKENIZER, "sea : ", ["wave"]), "best")], None, "unknown label 'best'"),
        ([{"prompt": "sea : ", "completion": "wave", "label": float("nan")}], 0.5, "not all numbers"),
        ([], None, "no data"),
        (PAIRS, (0.5, 0.5), "increasing"),
        (PAIRS, (0.1, 0.2, 0.3), "increasing"),
        (PAIRS, float("nan"), "increasing"),
    ],
)
def test_data_that_cannot_be_used(data, threshold, message):
    with pytest.raises(ValueError, match=message):
        tuning().fit(data, threshold=threshold, stage1_steps=1, stage2_steps=1)


def test_pairs_make_two_labels():
    with pytest.raises(UserError, match="good and bad make two labels, and there are 3"):
        tuning(labels=["a", "b", "c"]).rows(PAIRS)


def test_data_of_another_kind():
    with pytest.raises(TypeError, match="row 0 is a str"):
        tuning().rows(["sea : wave"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": "good"}, "labels is 'good'"),
        ({"labels": ["good"]}, "two or more"),
        ({"labels": ["good", "good"]}, "different"),
        ({"labels": ["good", "very bad"]}, "'very bad'"),
        ({"labels": ["default", "bad"]}, "not 'default'"),
        ({"control": "prefix"}, "control is 'prefix'; expected one of prompt, lora, text, token"),
        ({"control": "text"}, "init_text for every label; 'good'"),
        ({"control": "lora", "num_virtual_tokens": 3}, "num_virtual_tokens is 3 with control 'lora'"),
        ({"num_virtual_tokens": 0}, "num_virtual_tokens is 0"),
        ({"init_text": {"nice": "wave"}}, "'nice', which is no label"),
        ({"init_text": {"good": " "}}, "no token"),
        ({"init": "zeros"}, "init is 'zeros'"),
        ({"control": "lora", "rank": 0}, "rank is 0"),
    ],
)
def test_arguments_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        ControlTuning(model(), TOKENIZER, **options)


@pytest.mark.parametrize(
    ("control", "options", "message"),
    [
        ("prompt", {"stage1_steps": 0, "stage2_steps": 0}, "trains nothing"),
        ("prompt", {"stage1_steps": -1}, "stage1_steps is -1"),
        ("prompt", {"lr": (0.1, 0.0)}, "a learning rate is 0.0"),
        ("prompt", {"lr": (0.1,)}, "expected two rates"),
        ("text", {}, "set stage1_steps=0"),
        ("text", {"stage1_steps": 0, "stage2_control_lr": 0.1}, "no learning rate of its own"),
        ("token", {"stage1_steps": 0, "lora": 2}, "set lora=0"),
    ],
)
def test_training_that_cannot_be(control, options, message):
    with pytest.raises(ValueError, match=message):
        tuning(control).fit(PAIRS, **options)


def test_unknown_controls_and_models_with_adapters_are_refused(tmp_path):
    found = tuning()
    with pytest.raises(UserError, match="no control 'nice'; there are good, bad"):
        found.generate(PROMPTS, label="nice")
    with pytest.raises(UserError, match="no control 'nice'"):
        found.log_probs(PROMPTS, [["wave"]] * 3, label="nice")
    with pytest.raises(ValueError, match="adapters already"):
        ControlTuning(found.model, TOKENIZER)
    with pytest.raises(UserError, match="holds no controls"):
        ControlTuning.from_pretrained(tmp_path)


def test_divergence_is_said_with_stage_and_step():
    with pytest.raises(ArithmeticError, match="stage 2, step"):
        tuning().fit(PAIRS, stage1_steps=2, stage2_steps=50, lr=(0.01, 1e200), batch=6)


# what it is for


@pytest.fixture(scope="module")
def world_language():
    return WORLD.language(1000, texts=3072, steps=120)


def test_one_model_obeys_three_preferences(world_language):
    """Short, long, and with the word tram: labels that exclude each other, which no one policy can follow at once."""
    rng = np.random.default_rng(0)
    rows = []
    for prompt in WORLD.prompts(rng, 1500):
        answer = WORLD.answer(rng, prompt)
        size, keyword = len(answer.split()), "tram" in answer.split()
        label = "keyword" if keyword else "short" if size <= 4 else "long" if size >= 10 else None
        if label is not None:
            rows.append({"prompt": prompt, "completion": answer, "label": label})
    found = ControlTuning(*world_language, labels=["short", "long", "keyword"], num_virtual_tokens=4)
    report = found.fit(rows, stage1_steps=60, stage2_steps=100, lr=(3e-2, 5e-3), batch=32)
    assert min(report.counts.values()) > 100
    assert found.label_accuracy(rows) > 0.9  # chance is a third
    prompts = WORLD.prompts(rng, 100)
    answers = {
        label: [own[0].text.split() for own in found.generate(prompts, label, max_new_tokens=16, batch_size=100)]
        for label in found.labels
    }
    length = {label: np.mean([len(words) for words in own]) for label, own in answers.items()}
    tram = {label: np.mean(["tram" in words for words in own]) for label, own in answers.items()}
    assert length["short"] < 5
    assert length["long"] > 9
    assert tram["keyword"] > 0.5
    assert max(tram["short"], tram["long"]) < 0.25


# the command line's way


@pytest.mark.parametrize("lora", [0, 2])
def test_train_by_name_saves_model_and_controls(tmp_path, lora):
    examples = [
        Example(
            prompt=row["prompt"],
            completions=(row["chosen"], row["rejected"]),
            scores=(1.0, 0.0),
            kind="pair",
            where="x",
        )
        for row in PAIRS
    ]
    out = tmp_path / "run"
    settings = TrainSettings(steps=6, batch=4, learning_rate=1e-2, lora=lora, held_out=0.0)
    language = Language(model(dtype=torch.float32), TOKENIZER)
    done = train(language, examples, method="meet", out=out, settings=settings)
    assert [(row["stage"], row["step"]) for row in done.history] == [(1 + (n > 3), n) for n in range(1, 7)]
    assert done.notes == ("3 good (50%); 3 bad (50%)",)
    assert json.loads((out / "result.json").read_text())["method"] == "meet"
    back = ControlTuning.from_pretrained(out)
    assert back.controls == ("good", "bad")
    with pytest.raises(UserError, match="finished"):
        train(language, examples, method="meet", out=out, settings=settings)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stage1_share": 1.5}, "stage1_share is 1.5"),
        ({"control_learning_rate": 0.0}, "control_learning_rate"),
        ({"control": "prefix"}, "control is"),
        ({"threshold": (3.0, 1.0)}, "increasing"),
    ],
)
def test_a_method_with_bad_settings_is_refused_before_anything_is_loaded(options, message):
    with pytest.raises(ValueError, match=message):
        ControlTraining(**options)


def test_the_comparison_gives_all_arms_equal_second_stages_or_equal_totals():
    assert [steps_of(stages, "second", 100) for stages in ("both", "model", "control")] == [
        (100, 100),
        (0, 100),
        (100, 0),
    ]
    assert {sum(steps_of(stages, "total", 100)) for stages in ("both", "model", "control")} == {200}
