"""generate(): against transformers' own decoding, whole-sequence logits, and probabilities computed by hand."""

import random
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from counterproof.errors import UserError
from counterproof.language.sampling import Generation, generate

END, BEGIN = 0, 1
# Bytes, and some longer tokens, so that stop strings and characters fall between and across tokens.
MERGED = ["th", "he", "the", "an", "and", "ing", "ab", "ba", "abba", " a", " t", "é"]
TEMPLATE = "{% for m in messages %}<|begin|>{{ m.role }}:{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|begin|>assistant:{% endif %}"  # noqa: E501


class Language(NamedTuple):
    model: Any
    tokenizer: Any


def byte_tokenizer(template=TEMPLATE):
    """Byte-level; id 0 is <|end|> = eos = pad, id 1 <|begin|>, then the 256 bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<|end|>": END, "<|begin|>": BEGIN}
    for token in alphabet:
        vocab[token] = len(vocab)
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    merges = []
    for word in MERGED:
        pieces = [*to_bytes.pre_tokenize_str(word)[0][0]]
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces[:2] = [pieces[0] + pieces[1]]
            vocab.setdefault(pieces[0], len(vocab))
    inner = Tokenizer(models.BPE(vocab, list(dict.fromkeys(merges))))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|end|>", pad_token="<|end|>", bos_token="<|begin|>"
    )
    tokenizer.chat_template = template
    return tokenizer


SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS = {
    "llama": SIZES | {"num_key_value_heads": 2},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 128},  # learned absolute positions
    "gemma2": SIZES | {"num_key_value_heads": 2, "head_dim": 4, "sliding_window": 4},
    "gpt_neox": SIZES,
}


def random_model(name="llama", vocab=None, seed=0, spread=0.5, **more):
    vocab = len(byte_tokenizer()) if vocab is None else vocab
    sizes = {"max_position_embeddings": 128} if name != "gpt2" else {}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = AutoConfig.for_model(
            name, **{**MODELS[name], **sizes, "vocab_size": vocab, "eos_token_id": END, "pad_token_id": END, **more}
        )
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():  # far from uniform predictions, so that a slip shows
            parameter.data += spread * torch.randn_like(parameter)
    return model.eval()


@pytest.fixture(scope="module")
def language():
    return Language(random_model(), byte_tokenizer())


PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14], [1], [20, 21], [33, 34, 35, 36, 37]]


def next_probs(model, ids):
    with torch.no_grad():
        return model(input_ids=torch.tensor([list(ids)])).logits[0, -1].double().softmax(-1).numpy()


def naive_logprobs(model, prompt, tokens):
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *tokens]])).logits[0]
    logps = logits.double().log_softmax(-1)[-len(tokens) - 1 : -1]  # from the end: virtual tokens come first
    return logps.gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist()


# greedy, and log-probabilities


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_greedy_is_that_of_transformers_token_for_token(name, batch_size):
    language = Language(random_model(name), byte_tokenizer())
    found = generate(language, PROMPTS, temperature=0, max_new_tokens=25, batch_size=batch_size)
    for prompt, (one,) in zip(PROMPTS, found, strict=True):
        ids = torch.tensor([prompt])
        out = language.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=25, eos_token_id=END
        )
        expected = out[0, len(prompt) :].tolist()
        assert list(one.tokens) == expected
        assert one.finish == ("eos" if expected[-1] == END else "length")


def test_greedy_stops_with_the_end_token_and_goes_on_in_other_rows():
    """Of many prompts some end early, at different times, in one batch."""
    language = Language(random_model(), byte_tokenizer())
    with torch.no_grad():  # make the end token likely
        language.model.lm_head.weight[END] *= 4
    prompts = [[i, i + 1] for i in range(5, 45)]
    found = [one for (one,) in generate(language, prompts, temperature=0, max_new_tokens=12, batch_size=40)]
    finishes = {one.finish for one in found}
    assert finishes == {"eos", "length"}
    assert len({len(one.tokens) for one in found if one.finish == "eos"}) > 1
    for prompt, one in zip(prompts, found, strict=True):
        assert one.finish == "eos" or len(one.tokens) == 12
        assert (one.tokens.index(END) == len(one.tokens) - 1) if one.finish == "eos" else END not in one.tokens
        assert one.text == language.tokenizer.decode(one.tokens, skip_special_tokens=True)
        for size, token in enumerate(one.tokens):
            assert next_probs(language.model, [*prompt, *one.tokens[:size]]).argmax() == token


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("temperature", "top_p"), [(1, 1), (0.7, 0.8), (1.6, 1), (0, 1)])
@pytest.mark.parametrize("batch_size", [1, 7])
def test_logprobs_are_those_of_the_untempered_model(name, temperature, top_p, batch_size):
    language = Language(random_model(name), byte_tokenizer())
    found = generate(
        language, PROMPTS, samples=3, temperature=temperature, top_p=top_p, max_new_tokens=9, batch_size=batch_size
    )
    for prompt, own in zip(PROMPTS, found, strict=True):
        for one in own:
            assert len(one.tokens) == len(one.logprobs) > 0
            assert one.logprobs == pytest.approx(naive_logprobs(language.model, prompt, one.tokens), abs=1e-4)
            assert one.logprob == sum(one.logprobs)


def test_equal_prompts_are_read_once(language):
    read = []
    hook = language.model.model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    prompt = [(*range(5, 55),)]
    generate(language, prompt * 2, samples=4, max_new_tokens=3, batch_size=8)
    hook.remove()
    assert read == [49, 8, 8, 8]


# sampling


def one_step(temperature, top_p, draws=6000, vocab=12):
    """Observed counts of the first token, and the model's probabilities."""
    model = random_model(vocab=vocab, spread=0.3)
    language = Language(model, byte_tokenizer())
    (own,) = generate(
        language, [[5, 6]], samples=draws, temperature=temperature, top_p=top_p, max_new_tokens=1, batch_size=2000
    )
    counts = np.bincount([one.tokens[0] for one in own], minlength=vocab)
    probs = next_probs(model, [5, 6]) ** (1 / temperature)
    return counts, probs / probs.sum()


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.5])
def test_tokens_come_as_often_as_they_are_probable(temperature):
    counts, probs = one_step(temperature, 1.0)
    assert probs.max() < 0.6
    assert probs.min() * counts.sum() > 3
    assert chisquare(counts, probs * counts.sum()).pvalue > 1e-3
    # The test can tell: it refuses other temperatures.
    other = probs ** (1 / 1.3)
    assert chisquare(counts, other / other.sum() * counts.sum()).pvalue < 1e-6


@pytest.mark.parametrize("top_p", [0.3, 0.75, 0.9])
def test_top_p_keeps_exactly_the_nucleus(top_p):
    counts, probs = one_step(1.2, top_p)
    order = np.argsort(-probs)
    size = int(np.searchsorted(np.cumsum(probs[order]), top_p)) + 1  # the fewest that reach it
    nucleus = sorted(order[:size])
    assert 1 <= size < len(probs)
    assert sorted(np.flatnonzero(counts)) == nucleus
    inside = probs[nucleus] / probs[nucleus].sum()
    assert size == 1 or chisquare(counts[nucleus], inside * counts.sum()).pvalue > 1e-3


def test_two_tokens_come_by_their_joint_probability():
    """The second token is drawn afresh: independent of the first but through the model."""
    model = random_model(vocab=6, spread=0.2)
    language = Language(model, byte_tokenizer())
    (own,) = generate(language, [[3, 4]], samples=8000, max_new_tokens=2, batch_size=2000)
    first = next_probs(model, [3, 4])
    counts, expected = [], []
    for a in range(6):
        if a == END:
            counts.append(sum(one.tokens == (END,) for one in own))
            expected.append(first[a])
            continue
        second = next_probs(model, [3, 4, a])
        for b in range(6):
            counts.append(sum(one.tokens == (a, b) for one in own))
            expected.append(first[a] * second[b])
    assert sum(counts) == 8000
    assert chisquare(counts, np.array(expected) / sum(expected) * 8000).pvalue > 1e-3


def test_a_sample_is_the_maximum_of_log_probabilities_and_its_own_stream_of_noise(language):
    """The definition, computed row by row without a cache."""
    found = generate(language, PROMPTS, samples=2, seed=5, temperature=0.8, max_new_tokens=6)
    for i, prompt in enumerate(PROMPTS):
        for j in range(2):
            stream, ids = np.random.default_rng((5, i, j)), list(prompt)
            for token in found[i][j].tokens:
                probs = next_probs(language.model, ids)
                noise = -np.log(stream.standard_exponential(len(probs)))
                assert token == (np.log(probs) / 0.8 + noise).argmax()
                ids.append(token)


@pytest.mark.parametrize("name", MODELS)
def test_batches_play_no_part(name):
    language = Language(random_model(name), byte_tokenizer())
    settings = {"samples": 3, "max_new_tokens": 12, "top_p": 0.95, "stop": ["th", "z"]}
    alone = generate(language, PROMPTS, batch_size=1, **settings)
    for size in (2, 7, 64):
        batched = generate(language, PROMPTS, batch_size=size, **settings)
        for own, other in zip(alone, batched, strict=True):
            for one, same in zip(own, other, strict=True):
                assert (one.text, one.tokens, one.finish) == (same.text, same.tokens, same.finish)
                assert one.logprobs == pytest.approx(same.logprobs, abs=1e-4)


def test_seeds_repeat_and_differ(language):
    prompts = [[5, 6, 7]] * 3

    def tokens(**settings):
        found = generate(language, prompts, max_new_tokens=8, samples=2, **settings)
        return [one.tokens for own in found for one in own]

    assert tokens(seed=3) == tokens(seed=3)
    assert len(set(tokens(seed=3))) == 6  # every prompt and every sample has its own noise
    assert not set(tokens(seed=3)) & set(tokens(seed=4))
    assert tokens(temperature=0, seed=3) == tokens(temperature=0, seed=4)


def test_more_samples_begin_with_the_fewer(language):
    few, many = (generate(language, PROMPTS, samples=n, max_new_tokens=5) for n in (2, 5))
    assert [[one.tokens for one in own] for own in few] == [[one.tokens for one in own[:2]] for own in many]


def test_a_prompt_with_its_own_seed_may_stand_anywhere(language):
    seeds = [11, 2**63, 13, 14, 15]
    found = generate(language, PROMPTS, seed=seeds, samples=2, max_new_tokens=6)
    back = generate(
        language, PROMPTS[::-1], seed=np.array(seeds, dtype=np.uint64)[::-1].tolist(), samples=2, max_new_tokens=6
    )
    assert [[one.tokens for one in own] for own in found] == [[one.tokens for one in own] for own in back[::-1]]
    with pytest.raises(ValueError, match="2 seeds for 5 prompts"):
        generate(language, PROMPTS, seed=[1, 2])


def test_two_models_get_the_same_noise():
    """Near models say nearly the same: far more often than by independent noise."""
    near = random_model(vocab=40)
    tokenizer = byte_tokenizer()
    (first,) = generate(Language(near, tokenizer), [[5, 6]], samples=400, max_new_tokens=1, batch_size=400)
    with torch.no_grad():
        before = next_probs(near, [5, 6])
        near.lm_head.weight += 0.02 * torch.randn(near.lm_head.weight.shape, generator=torch.Generator().manual_seed(0))
    (second,) = generate(Language(near, tokenizer), [[5, 6]], samples=400, max_new_tokens=1, batch_size=400)
    after = next_probs(near, [5, 6])
    agree = np.mean([a.tokens == b.tokens for a, b in zip(first, second, strict=True)])
    distance = np.abs(before - after).sum() / 2
    assert distance > 0
    # Of Gumbel couplings at least (1 - d) / (1 + d) agree; three standard errors of the mean are allowed for.
    bound = (1 - distance) / (1 + distance)
    assert agree >= bound - 3 * np.sqrt(bound * (1 - bound) / 400)
    assert agree > (before * after).sum() + 0.2


# stop strings


@pytest.mark.parametrize("batch_size", [1, 8])
def test_a_stop_string_cuts_the_text_wherever_it_falls_in_the_tokens(batch_size):
    language = Language(random_model(spread=0.2), byte_tokenizer())
    plain = [i for i in range(2, len(language.tokenizer)) if language.tokenizer.decode([i]).strip("abdeghint é") == ""]
    language.model.lm_head.bias = torch.nn.Parameter(torch.full((len(language.tokenizer),), -30.0))
    language.model.lm_head.bias.data[plain] = 0.0
    free = generate(language, PROMPTS, samples=2, max_new_tokens=14)
    across = inside = 0
    for at in range(2, 12, 4):
        stops = [(i, j, one.text[at : at + 3]) for i, own in enumerate(free) for j, one in enumerate(own)]
        for i, j, stop in stops[:6]:
            if len(stop) < 3 or "\ufffd" in stop:
                continue
            found = generate(language, PROMPTS, samples=2, max_new_tokens=14, stop=stop, batch_size=batch_size)
            one, whole = found[i][j], free[i][j]
            assert one.finish == "stop"
            assert one.text == whole.text[: whole.text.find(stop)]
            size = len(one.tokens)
            assert one.tokens == whole.tokens[:size]
            assert one.logprobs == pytest.approx(whole.logprobs[:size], abs=1e-4)
            decode = language.tokenizer.decode
            assert decode(one.tokens).startswith(one.text)
            assert size == 0 or not decode(one.tokens[:-1]).startswith(one.text)
            across += decode(one.tokens) != one.text
            inside += decode(one.tokens) == one.text
            for k, own in enumerate(found):  # the others go on as if nothing had been said
                for m, other in enumerate(own):
                    if stop not in free[k][m].text:
                        assert other.tokens == free[k][m].tokens
    assert across > 5
    assert inside > 5


def scripted(language, text):
    """The model's own continuation replaced: its head says the tokens of a text one after the other."""
    tokens = language.tokenizer.encode(text)
    model = random_model()
    model.model.embed_tokens.weight.data.zero_()
    size = len(tokens) + 2
    assert size <= 128

    def says(module, args, kwargs, output):
        output.logits.fill_(-20.0)
        at = kwargs["position_ids"][:, -1] - 1  # after a prompt of two tokens
        output.logits[torch.arange(len(at)), -1, torch.tensor([*tokens, END])[at.clamp(max=len(tokens))]] = 20.0
        return output

    model.register_forward_hook(says, with_kwargs=True)
    return Language(model, language.tokenizer)


@pytest.mark.parametrize(
    ("said", "stop", "text", "last"),
    [
        ("so the end", [" t"], "so", None),  # at a token's beginning
        ("so the end", [" th"], "so", None),  # across " " and "the"
        ("so the end", ["he"], "so t", "the"),  # inside a token, which is kept: it holds the "t"
        ("xandy", ["nd"], "xa", "and"),
        ("xandy", ["dy", "an"], "x", None),  # the earliest counts
        ("xandy", ["xa"], "", ""),  # nothing is left
        ("café an", [" a"], "café", "é"),
        ("one two", ["<|end|>"], "one two", None),  # spells the end token
        ("one<|begin|>two", ["<|begin|>"], "one", None),  # spells another special token
        ("one<|begin|>two", ["x"], "onetwo", None),
    ],
)
def test_stop_strings_by_hand(language, said, stop, text, last):
    speaker = scripted(language, said)
    ((one,),) = generate(speaker, [[5, 6]], stop=stop)
    assert one.text == text
    assert one.finish == ("eos" if stop in (["<|end|>"], ["x"]) else "stop")
    if last == "":
        assert one.tokens == one.logprobs == ()
    elif last is not None:
        assert language.tokenizer.decode(one.tokens[-1:]) == last
    if one.finish == "eos":
        assert one.tokens[-1] == END


# prompts


def test_chat_messages_are_rendered_up_to_the_answer(language):
    messages = [{"role": "system", "content": "the"}, {"role": "user", "content": "hello"}]
    text = "<|begin|>system:the<|end|><|begin|>user:hello<|end|><|begin|>assistant:"
    ids = language.tokenizer.encode(text)
    results = [generate(language, [prompt], max_new_tokens=6)[0][0].tokens for prompt in (messages, text, ids)]
    assert results[0] == results[1] == results[2]
    mixed = generate(language, [ids, text, messages, torch.tensor(ids), np.array(ids)], max_new_tokens=6, seed=[7] * 5)
    assert len({own[0].tokens for own in mixed}) == 1
    assert messages[0] == {"role": "system", "content": "the"}


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ("", "prompt 2 is empty"),
        ([], "prompt 2 is empty"),
        ([3] * 128, "prompt 2 has 128 tokens, and the model's context of 128"),
        ("x" * 300, "prompt 2 has 300 tokens"),
        ([5, 9999], "prompt 2 has the token id 9999"),
        ([5, -1], "prompt 2 has the token id -1"),
    ],
)
def test_a_prompt_that_cannot_be_continued_is_named(language, bad, says):
    with pytest.raises(UserError, match=says):
        generate(language, ["a", "b", bad, "c"])


def test_messages_need_a_template_that_takes_them(language):
    messages = [{"role": "user", "content": "hello"}]
    with pytest.raises(UserError, match="prompt 1 is chat messages, and this model's tokenizer has no chat template"):
        generate(Language(language.model, byte_tokenizer(None)), ["a", messages])
    picky = byte_tokenizer("{{ raise_exception('no system here') }}")
    with pytest.raises(UserError, match="prompt 0 does not suit the model's chat template: no system here"):
        generate(Language(language.model, picky), [messages])


USER = {"role": "user", "content": "x"}


@pytest.mark.parametrize("prompts", ["a text", USER, [USER], [5, 6], [["a", "b"]], [None]])
def test_what_is_no_list_of_prompts_is_refused(language, prompts):
    with pytest.raises(TypeError):
        generate(language, prompts)


@pytest.mark.parametrize(
    "settings",
    [{"max_new_tokens": 0}, {"samples": 0}, {"batch_size": 0}, {"temperature": -1}, {"temperature": float("nan")},
     {"temperature": float("inf")}, {"top_p": 0}, {"top_p": 1.1}, {"stop": ["a", ""]}, {"seed": -1}],
)  # fmt: skip
def test_arguments_out_of_range_are_refused(language, settings):
    with pytest.raises(ValueError):
        generate(language, ["a"], **settings)


def test_nothing_asked_nothing_said(language):
    assert generate(language, []) == []


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_context_ends_a_continuation(name):
    language = Language(random_model(name), byte_tokenizer())
    with torch.no_grad():  # it never ends by itself
        (language.model.lm_head if name == "llama" else language.model.transformer.wte).weight[END] = 0
    prompts = [[5] * 125, [6] * 10, [7] * 127, [5] * 125, [8] * 20]
    found = generate(language, prompts, max_new_tokens=6, samples=2, seed=[1, 2, 3, 4, 5])
    sizes = [[len(one.tokens) for one in own if one.finish == "length"] for own in found]
    assert sizes == [[3, 3], [6, 6], [1, 1], [3, 3], [6, 6]]
    alone = generate(language, [prompts[1]], max_new_tokens=6, samples=2, seed=[2])
    assert [one.tokens for one in alone[0]] == [one.tokens for one in found[1]]


# what is left as it was


def test_no_global_generator_is_touched(language):
    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    generate(language, PROMPTS, samples=3, max_new_tokens=4, top_p=0.9)
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    assert before == after


def test_the_model_is_left_as_it_was():
    model = random_model(attention_dropout=0.5)
    model.generation_config.repetition_penalty = 3.0
    model.generation_config.suppress_tokens = [7]
    settings = model.generation_config
    language = Language(model, byte_tokenizer())
    plain = generate(Language(random_model(), byte_tokenizer()), PROMPTS, max_new_tokens=9)
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    # Neither dropout nor the checkpoint's own penalties take part.
    assert generate(language, PROMPTS, max_new_tokens=9) == plain
    assert [module.training for module in model.modules()] == modes
    assert model.generation_config is settings
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    with pytest.raises(FloatingPointError, match="not a number"):
        generate(language, PROMPTS)
    assert [module.training for module in model.modules()] == modes
    assert model.generation_config is settings


def test_every_end_token_of_the_checkpoint_ends():
    model = random_model()
    probs = next_probs(model, [5, 6])
    model.generation_config.eos_token_id = [END, int(probs.argmax())]
    ((one,),) = generate(Language(model, byte_tokenizer()), [[5, 6]], temperature=0)
    assert one == Generation("", (int(probs.argmax()),), one.logprobs, "eos")


def test_progress_counts_continuations(language):
    seen = []
    generate(language, PROMPTS, samples=3, max_new_tokens=2, batch_size=4, progress=lambda *at: seen.append(at))
    assert seen == [(4, 15), (8, 15), (12, 15), (15, 15)]


@pytest.mark.parametrize("kind", ["lora", "prompt", "prefix"])
def test_peft_models(kind):
    import peft

    config = {
        "lora": lambda: peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False),
        "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    }[kind]()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = peft.get_peft_model(random_model(), config)
    language = Language(model.eval(), byte_tokenizer())
    base = generate(Language(random_model(), byte_tokenizer()), PROMPTS, max_new_tokens=6)
    found = generate(language, PROMPTS, samples=2, max_new_tokens=6)
    assert [own[0].logprob for own in found] != pytest.approx([own[0].logprob for own in base], abs=1e-3)
    for prompt, own in zip(PROMPTS, found, strict=True):
        for one in own:
            assert one.logprobs == pytest.approx(naive_logprobs(model, prompt, one.tokens), abs=1e-4)
    if kind == "lora":
        with model.disable_adapter():
            plain = generate(language, PROMPTS, max_new_tokens=6)
        assert [own[0].tokens for own in plain] == [own[0].tokens for own in base]
    else:
        with pytest.raises(UserError, match="context of 125"):
            generate(language, [[5] * 125])
