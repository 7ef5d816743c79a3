"""Examples to tokens: against TRL's chat rendering and prompt boundary, with a tokenizer that merges across it."""

from dataclasses import replace

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from trl.data_utils import apply_chat_template, common_prefix_length

from counterproof.errors import UserError
from counterproof.preference import Example, encode, survey

TEXT = [
    "What is a counterproof?",
    "A print pulled from a fresh proof.",
    " the sky is blue and the sea is green",
    "yes no",
]
TEMPLATE = (
    "{% if tools %}<|im_start|>tools\n{{ tools | length }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}"
    "{% if m.role == 'critic' %}{{ raise_exception('no critics,\n please') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if brief %}Briefly: {% endif %}{% endif %}"
)


def tokenizer(chat=True, bos=False):
    """Byte-level BPE; as in SmolLM2 the end of a turn is the end token, and a newline is rendered after it."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>", "<s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        TEXT * 4, trainers.BpeTrainer(vocab_size=340, special_tokens=special, initial_alphabet=alphabet)
    )
    if bos:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|im_end|>", bos_token="<s>" if bos else None
    )
    if chat:
        made.chat_template = TEMPLATE
    return made


def pair(prompt="the sky is", chosen=" blue", rejected=" green", **columns):
    return Example(
        prompt=prompt, completions=(chosen, rejected), scores=(1.0, 0.0), kind="pair", columns=columns, where="a:7"
    )


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


CHAT = pair([user(TEXT[0])], [assistant(TEXT[1])], [assistant("no")])


def trls(example, tokenizer):
    """The prompt, chosen and rejected ids that TRL's DPOTrainer makes, from its public pieces."""
    row = {"prompt": example.prompt, "chosen": example.completions[0], "rejected": example.completions[1]}
    if example.conversational:
        row = {**row, "chat_template_kwargs": example.columns.get("chat_template_kwargs", {})}
        row = apply_chat_template(row, tokenizer, tools=example.columns.get("tools"))
        add = {"add_special_tokens": False}
    else:
        row = {**row, "chosen": row["chosen"] + tokenizer.eos_token, "rejected": row["rejected"] + tokenizer.eos_token}
        add = {}
    prompt = tokenizer(row["prompt"], **add)["input_ids"]
    wholes = [tokenizer(row["prompt"] + row[name], **add)["input_ids"] for name in ("chosen", "rejected")]
    length = min(common_prefix_length(prompt, whole) for whole in wholes)
    return prompt[:length], [whole[length:] for whole in wholes]


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize(
    "example",
    [
        pair(),
        pair("the sky is ", "blue", "green"),  # the space merges into both
        pair("the s", "ky", "ea"),  # letters merge into one only
        CHAT,
        pair([user("no")], [assistant("a"), user("b"), assistant("c")], [assistant("d")]),
        replace(CHAT, columns={"chat_template_kwargs": {"brief": True}}),
        replace(CHAT, columns={"tools": [{"type": "function", "function": {"name": "f"}}]}),
    ],
    ids=["plain", "space", "letters", "chat", "turns", "kwargs", "tools"],
)
def test_tokens_are_trls(example, bos):
    tok = tokenizer(bos=bos)
    encoded = encode(example, tok, max_length=None)
    prompt, completions = trls(example, tok)
    assert list(encoded.group.prompt) == prompt
    assert [list(ids) for ids in encoded.group.completions] == completions
    assert encoded.cut == 0


def test_the_merging_cases_merge():
    """Otherwise the test above would not test the boundary."""
    tok = tokenizer()
    prompt = encode(pair("the sky is ", "blue", "green"), tok, max_length=None).group.prompt
    assert tok.decode(prompt) == "the sky is"
    tools = [{"type": "function"}]
    as_text = encode(replace(CHAT, columns={"tools": '[{"type": "function"}]'}), tok, max_length=None)
    assert as_text == encode(replace(CHAT, columns={"tools": tools}), tok, max_length=None)
    assert as_text != encode(CHAT, tok, max_length=None)


@pytest.mark.parametrize("bos", [False, True])
def test_what_is_too_long_is_cut_from_the_beginning_of_the_prompt(bos):
    tok = tokenizer(bos=bos)
    example = pair(TEXT[2] * 2)
    whole = encode(example, tok, max_length=None).group
    longest = max(map(len, whole.completions))
    for limit in range(longest + 1, longest + len(whole.prompt) + 3):
        group, cut = encode(example, tok, max_length=limit)
        assert group.completions == whole.completions
        assert len(group.prompt) == min(len(whole.prompt), limit - longest)
        assert cut == len(whole.prompt) - len(group.prompt)
        if bos and len(group.prompt) > 1:
            assert group.prompt == whole.prompt[:1] + whole.prompt[cut + 1 :]
        else:
            assert group.prompt == whole.prompt[cut:]
    with pytest.raises(UserError, match=rf"a:7: a completion of {longest} tokens .* max_length {longest}; raise it to"):
        encode(example, tok, max_length=longest)


def test_what_the_template_renders_after_the_end_token_can_be_dropped():
    tok = tokenizer()
    end, newline = tok.eos_token_id, tok("\n")["input_ids"][0]
    whole = encode(CHAT, tok, max_length=None).group
    trimmed = encode(CHAT, tok, max_length=None, trim_after_eos=True).group
    assert trimmed.prompt == whole.prompt
    for long, short in zip(whole.completions, trimmed.completions, strict=True):
        assert long == (*short, newline)
        assert short[-1] == end
        assert short.count(end) == 1
    # A completion of several messages keeps all of them.
    turns = pair([user("no")], [assistant("a"), user("b"), assistant("c")], [assistant("d<|im_end|>")])
    several, doubled = encode(turns, tok, max_length=None, trim_after_eos=True).group.completions
    assert (several.count(end), several[-1]) == (3, end)
    assert doubled.count(end) == 1
    # Room is made for what is left of the completion.
    limit = len(trimmed.prompt) + max(map(len, trimmed.completions))
    assert encode(CHAT, tok, max_length=limit, trim_after_eos=True).cut == 0
    assert encode(CHAT, tok, max_length=limit).cut == 1
    # Plain text ends on its end token already.
    assert encode(pair(), tok, max_length=None) == encode(pair(), tok, max_length=None, trim_after_eos=True)


def test_what_cannot_be_rendered_is_named():
    with pytest.raises(UserError, match=r"a:7: the data are chat messages, and .* no chat template; use a chat model"):
        encode(CHAT, tokenizer(chat=False), max_length=None)
    critic = pair([{"role": "critic", "content": "x"}, user("y")], [assistant("a")], [assistant("b")])
    with pytest.raises(
        UserError, match="a:7: the tokenizer's chat template refuses the messages: no critics, please; ch"
    ):
        encode(critic, tokenizer(), max_length=None)
    with pytest.raises(UserError, match="a:7: a prompt alone has nothing to score"):
        encode(Example(prompt="p", completions=(), scores=(), kind="prompt", where="a:7"), tokenizer(), max_length=9)


def test_a_survey_counts_the_tokens_that_encode_makes():
    tok = tokenizer()
    examples = [CHAT, pair([user("yes")], [assistant("a")], [assistant("b " * 30)])]
    groups = [encode(example, tok, max_length=None).group for example in examples]
    tokens = survey(examples, tok).lengths["tokens"]
    assert tokens["prompt"].longest == max(len(group.prompt) for group in groups)
    assert tokens["rejected"].mean == sum(len(group.completions[1]) for group in groups) / 2
    prompt = Example(prompt=CHAT.prompt, completions=(), scores=(), kind="prompt")
    assert survey([prompt], tok).lengths["tokens"]["prompt"].longest == len(groups[0].prompt)
    assert set(survey([prompt], tok).lengths["tokens"]) == {"prompt"}
